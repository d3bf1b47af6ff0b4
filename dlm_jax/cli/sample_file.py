"""`dlm sample --prompts`: a text for every line of a file, in a job that can be stopped and resumed."""

import argparse
import dataclasses
import hashlib
import json
import pathlib
import time
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from dlm_jax.cli.shared import ResumeState
from dlm_jax.errors import DataError
from dlm_jax.sampling import SamplingStats
from dlm_jax.sampling.text import Segment, encode, split_gaps

if TYPE_CHECKING:
    from dlm_jax.pipeline import DiffusionLM
    from dlm_jax.sampling import SamplerConfig

KINDS = ("prompt", "infill")


@dataclasses.dataclass(frozen=True)
class PromptFile:
    """The texts of a file.

    Attributes:
      kind: "prompt" or "infill": the key of each record that holds its text.
      records: the objects of the file, in order.
      lines: the line number of each record.
      digest: hash of the file's content.
      room: {"max_new_tokens" or "gap_length": tokens}, as the method for this kind takes it.
    """

    path: str
    kind: str
    records: list[dict[str, Any]]
    lines: list[int]
    digest: str
    room: dict[str, int]

    def text(self, number: int) -> str:
        return self.records[number][self.kind]

    def segments(self, number: int) -> list[Segment]:
        """Returns the text of a record and its gaps, as `sampling.text.encode` takes them."""
        text = self.text(number)
        return split_gaps(text, **self.room) if self.kind == "infill" else [text, self.room["max_new_tokens"]]


def read_prompts(path: str, *, max_new_tokens: int, gap_length: int, reserved: Collection[str]) -> PromptFile:
    """Reads a .jsonl file of objects or texts, or a .txt file of prompts; skips empty lines.

    Args:
      max_new_tokens, gap_length: tokens after a prompt, and in a gap without a length.
      reserved: keys that the output adds.

    Raises:
      DataError: there is no such file, it is empty, or a line is malformed.
    """
    file = pathlib.Path(path)
    suffix = file.suffix.lower()
    if suffix not in (".jsonl", ".txt"):
        raise DataError(f"{path} is neither .jsonl, with an object with a prompt or an infill per line, nor .txt, with "
                        "a prompt per line; give one of these")
    if not file.is_file():
        raise DataError(f"there is no file {path}")
    content = file.read_bytes()
    records, lines, kinds = [], [], []
    for line, raw in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not raw.strip():
            continue
        try:
            record = {"prompt": raw.decode().removesuffix("\r")} if suffix == ".txt" else _parse_record(raw.decode())
            kinds.append(_check_record(record, reserved))
            if kinds[-1] != kinds[0]:
                raise ValueError(f"a file has either prompts or infills, and line {lines[0]} has the key {kinds[0]!r}; "
                                 "split the file in two")
        except UnicodeDecodeError as error:
            raise DataError(f"{path}, line {line}: it is not UTF-8; convert the file") from error
        except (ValueError, DataError) as error:
            raise DataError(f"{path}, line {line}: {error}") from error
        records.append(record)
        lines.append(line)
    if not records:
        raise DataError(f"{path} is empty; write a text on each line")
    room = {"gap_length": gap_length} if kinds[0] == "infill" else {"max_new_tokens": max_new_tokens}
    return PromptFile(path, kinds[0], records, lines, hashlib.sha256(content).hexdigest(), room)


def _parse_record(text: str) -> dict[str, Any]:
    example = 'write an object such as {"prompt": "Once"}'
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON ({error.msg} at character {error.colno}); {example}") from error
    record = {"prompt": record} if isinstance(record, str) else record
    if not isinstance(record, dict):
        raise ValueError(f"it is neither an object nor a text; {example}")
    return record


def _check_record(record: dict[str, Any], reserved: Collection[str]) -> str:
    """Returns the kind of a record; a ValueError or DataError says what is wrong with it."""
    kinds = [kind for kind in KINDS if kind in record]
    if len(kinds) != 1:
        raise ValueError(f"it has {'both' if kinds else 'neither'} a prompt {'and' if kinds else 'nor'} an infill; "
                         "give it one of the two")
    kind, = kinds
    if not isinstance(record[kind], str):
        raise ValueError(f"its {kind} is not a text; put it in quotes")
    for key in reserved:
        if key in record:
            raise ValueError(f"the output adds the key {key!r}; rename it")
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError("it has half a character (a lone surrogate); remove it") from error
    if kind == "infill":
        split_gaps(record[kind], 1)
    return kind


def sample_file(prompts: PromptFile, arguments: argparse.Namespace, lm: "DiffusionLM",
                config: "SamplerConfig") -> dict[str, Any]:
    """Writes the texts that are not written yet, and returns settings and counts.

    A text's randomness is a function of its number, and batches start at multiples of their size whether or not the
    lines before are done, so that stopping changes nothing. The last batch starts early, to be as large as the others
    and to need no program of its own.

    Raises:
      ConfigError: existing lines were made with other settings.
      DataError: a line is too long for the model.
    """
    for line, number in zip(prompts.lines, range(len(prompts.records)), strict=True):
        row, _ = encode(lm.tokenizer, prompts.segments(number), lm.pretrained.start_token_id)
        if len(row) > lm.config.max_length:
            raise DataError(f"{prompts.path}, line {line}: {len(row)} tokens with its new ones, and the model takes at "
                            f"most {lm.config.max_length}; shorten it, or ask for fewer new tokens")
    each, total = arguments.num_samples, len(prompts.records) * arguments.num_samples
    settings = {"model": lm.pretrained.source, "mask_token_id": lm.pretrained.diffusion.mask_token_id,
                "dtype": arguments.dtype, **dataclasses.asdict(config), **prompts.room, "seed": arguments.seed,
                "num_samples": each}
    size = min(arguments.batch_size, total)
    call = lm.infill if prompts.kind == "infill" else lm.generate
    start, stats = time.perf_counter(), SamplingStats()
    with (ResumeState(arguments.out, {**settings, "input_sha256": prompts.digest[:16]}) as state,
          tqdm(total=total, initial=state.done, desc="texts", unit="text", disable=None) as bar):
        before = state.done
        while state.done < total:
            first = min(state.done // size * size, total - size)
            numbers = range(first, first + size)
            texts = call([prompts.text(number // each) for number in numbers], example_index=numbers, batch_size=size,
                         seed=arguments.seed, stats=stats, **prompts.room, **dataclasses.asdict(config))
            new = list(zip(numbers, texts, strict=True))[state.done - first :]
            state.add([{**prompts.records[number // each], **({} if each == 1 else {"sample": number % each}),
                        "text": text} for number, text in new])
            bar.set_postfix_str(f"{stats.tokens / (time.perf_counter() - start):,.0f} tokens/s", refresh=False)
            bar.update(len(new))
        state.finish()
    return {**settings, "out": arguments.out, **stats.summary(), "texts": total,
            "texts_now": total - before, "tokens_now": stats.tokens, "seconds": time.perf_counter() - start}
