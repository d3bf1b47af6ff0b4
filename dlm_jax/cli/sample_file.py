"""Texts for every line of a file."""

import argparse
import dataclasses
import time
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from dlm_jax.cli.partial import ResumeState
from dlm_jax.cli.sample_inputs import Inputs
from dlm_jax.errors import DataError
from dlm_jax.sampling.text import encode

if TYPE_CHECKING:
    from dlm_jax.pipeline import DiffusionLM
    from dlm_jax.sampling import SamplerConfig


def sample_file(inputs: Inputs, arguments: argparse.Namespace, lm: "DiffusionLM",
                config: "SamplerConfig") -> dict[str, Any]:
    """Writes the texts that are not written yet, and says what was done.

    A text's random numbers are a function of its number, and a batch begins at a multiple of its size whether or not
    the lines before it are done, so that stopping changes nothing. The last batch begins early, to be as large as
    the others and need no program of its own.

    Raises:
      ConfigError: the texts that are written were made with other settings.
      DataError: a line is too long for the model.
    """
    _check_lengths(inputs, lm)
    each = arguments.num_samples
    settings = {"model": lm.pretrained.source, "mask_token_id": lm.pretrained.mask_token_id, "dtype": arguments.dtype,
                **dataclasses.asdict(config), **inputs.room, "seed": arguments.seed, "num_samples": each}
    total = len(inputs.records) * each
    size = min(arguments.batch_size, total)
    call = lm.infill if inputs.kind == "infill" else lm.generate
    start, tokens = time.perf_counter(), 0
    with (ResumeState(arguments.out, {**settings, "input_sha256": inputs.digest[:16]}) as partial,
          tqdm(total=total, initial=partial.done, desc="texts", unit="text", disable=None) as bar):
        before = partial.done
        while partial.done < total:
            first = min(partial.done // size * size, total - size)
            numbers = range(first, first + size)
            texts = call([inputs.text(number // each) for number in numbers], example_index=numbers, batch_size=size,
                         seed=arguments.seed, **inputs.room, **dataclasses.asdict(config))
            new = list(zip(numbers, texts, strict=True))[partial.done - first :]
            partial.add([{**inputs.records[number // each], **({} if each == 1 else {"sample": number % each}),
                          "text": text} for number, text in new])
            tokens += sum(_generated(inputs, number // each, text, lm) for number, text in new)
            bar.set_postfix_str(f"{tokens / (time.perf_counter() - start):,.0f} tokens/s", refresh=False)
            bar.update(len(new))
        partial.finish()
    return {**settings, "out": arguments.out, "texts": total, "texts_now": total - before, "tokens_now": tokens,
            "seconds": time.perf_counter() - start}


def table(result: dict[str, Any]) -> str:
    rate = result["tokens_now"] / result["seconds"]
    return (f"{result['texts']} texts in {result['out']}; of these {result['texts_now']} now, {result['tokens_now']:,} "
            f"tokens in {result['seconds']:.0f} s ({rate:,.0f} a second)")


def _check_lengths(inputs: Inputs, lm: "DiffusionLM") -> None:
    """Before hours of work, that the last line fits as well."""
    for number, line in enumerate(inputs.lines):
        row, _ = encode(lm.tokenizer, inputs.pieces(number), bos_token_id=0)
        if len(row) > lm.config.max_length:
            raise DataError(f"{inputs.path}, line {line}: {len(row)} tokens, those to be found included, and the model "
                            f"takes at most {lm.config.max_length}; shorten it, or ask for fewer new tokens")


def _generated(inputs: Inputs, number: int, text: str, lm: "DiffusionLM") -> int:
    """How many tokens were generated for `text`: those up to an end of text, as the tokenizer would cut them.

    A gap of a length that was not given counts at its longest.
    """
    if inputs.kind == "infill":
        return sum(gap[-1] if isinstance(gap, range) else gap for gap in inputs.pieces(number)[1::2])
    added = lm.tokenizer(text[len(inputs.text(number)) :], add_special_tokens=False)["input_ids"]
    return min(len(added), inputs.room["max_new_tokens"])
