"""Writing by a model of ours: at the end of a prompt or between two texts, in batches of one shape."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dlm_jax.data.records import BadRecord, get_text
from dlm_jax.diffusion import DiffusionSpec
from dlm_jax.errors import ConfigError, DataError
from dlm_jax.evaluation.eval_model import GenerationRequest, Greedy, Pair, Write
from dlm_jax.evaluation.items import Fields, Item, cut
from dlm_jax.models import Transformer
from dlm_jax.random import example_keys
from dlm_jax.sampling import GAP, SamplerConfig, SamplingSpec, sample_rows
from dlm_jax.sampling.gap_length import infer_gap_lengths
from dlm_jax.sampling.text import Segment, decode, encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def make_write(model: Transformer, tokenizer: "PreTrainedTokenizerBase", config: SamplerConfig, *,
               diffusion: DiffusionSpec, bos_token_id: int, eos_token_id: int | None, seed: int = 0,
               batch_size: int = 16, mesh: Mesh | None = None, keep_bos: bool = True) -> Write:
    """A `Write` by sampling. What follows an end of text is cut off.

    Prompts that are too long lose their beginning; where both a text before a blank and one behind it are, they lose
    what is farthest from it, and either has half of the room that the other leaves it.

    A blank's text is a function of the seed, its item and its sample, never of the other blanks or the batch size. Of
    several lengths `sampling.gap_length` settles the one that suits the text behind, and the longest is taken where
    none is.

    Args:
      diffusion: mask token, shift and blocks of the model.
      keep_bos: whether BOS stands at position 0; else it is the prompt's first token that is context there.

    Raises:
      ConfigError: a text stands behind a blank and the policy goes from left to right.
    """
    encoder = functools.partial(encode, tokenizer, bos_token_id=bos_token_id)
    ends = () if eos_token_id is None else (eos_token_id,)

    def in_use() -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)

    def write(blanks: Sequence[GenerationRequest], *, temperature: float, num_steps: int | None) -> list[str]:
        settings = {"temperature": temperature}
        if config.policy != "autoregressive":
            settings["num_steps"] = num_steps
        # The samples of an item share its gap, whose length is settled once.
        gaps_of = {blank: [blank.before, blank.lengths, blank.after] if blank.after
                   else [blank.before, blank.lengths[-1]] for blank in (blank._replace(sample=0) for blank in blanks)}
        asked: list[list[Segment]] = [_shortened(segment, encoder, tokenizer, model.config.max_length)
                                    for segment in gaps_of.values()]
        with in_use():
            asked = _settled(asked, lambda texts: infer_gap_lengths(
                model, texts, encoder, diffusion=diffusion, batch_size=batch_size))
        settled = dict(zip(gaps_of, asked, strict=True))
        segments = [settled[blank._replace(sample=0)] for blank in blanks]
        rows, gaps = [], []
        for segment in segments:
            row, (gap,) = encoder(segment)
            surplus = max(len(row) - model.config.max_length, 0) if len(segment) == 2 else 0
            if surplus >= gap.start and surplus:
                raise ConfigError(f"{len(gap)} new tokens leave no room for a prompt in the {model.config.max_length} "
                                  "tokens that the model takes")
            first = 0 if keep_bos or gap.start == 1 else 1
            rows.append([*row[first:1], *row[1 + surplus :]])
            gaps.append(range(gap.start - surplus - first, gap.stop - surplus - first))
        filled = fill(rows, blanks, dataclasses.replace(config, **settings))
        texts = [decode(tokenizer, segment, [gap], row, ends if len(segment) == 2 else ())
                 for segment, gap, row in zip(segments, gaps, filled, strict=True)]
        return [text[len(segment[0]) : len(text) - len(segment[2]) if len(segment) > 2 else None]
                for text, segment in zip(texts, segments, strict=True)]

    def fill(rows: Sequence[Sequence[int]], blanks: Sequence[GenerationRequest],
             config: SamplerConfig) -> list[np.ndarray]:
        keys = _sample_keys(seed, blanks)
        result: list[np.ndarray] = [np.zeros(0, np.int32)] * len(rows)
        # An infilling has text behind it, a continuation has none: two programs.
        for behind in (False, True):
            spec = SamplingSpec(config, diffusion, ends, stop_at_eos=not behind and bool(ends))
            members = [i for i, blank in enumerate(blanks) if bool(blank.after) == behind]
            filled = sample_rows(model, [rows[i] for i in members], keys[np.array(members, int)], spec,
                                 batch_size=batch_size, mesh=mesh)
            for i, row in zip(members, filled, strict=True):
                result[i] = row
        return result

    return write


def _sample_keys(seed: int, blanks: Sequence[GenerationRequest]) -> jax.Array:
    """A key for each blank [blanks]: its item's, and of all samples but the first one derived from that."""
    samples = jnp.array([blank.sample for blank in blanks], jnp.uint32)
    keys = example_keys(seed, jnp.array([blank.item for blank in blanks], jnp.uint32))
    return jnp.where(samples == 0, keys, jax.vmap(jax.random.fold_in)(keys, samples))


def _shortened(segments: list[Segment], encoder: Callable[[Sequence[Segment]], tuple[list[int], list[range]]],
               tokenizer: "PreTrainedTokenizerBase", max_length: int) -> list[Segment]:
    """A gap with text on both sides, cut so that at the gap's longest the row fits; other pieces as they are."""
    row, (gap,) = encoder(segments)
    if len(segments) == 2 or len(row) <= max_length:
        return segments
    text = functools.partial(tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    before, after = row[1 : gap.start], row[gap.stop :]
    for room in range(max_length - 1 - len(gap), -1, -1):  # less where the cut texts have more tokens than they had
        kept = min(len(after), max(room // 2, room - len(before)))
        space = " " if segments[0].endswith(" ") else ""
        cut = [text(before[len(before) - min(room - kept, len(before)) :]) + space, segments[1], text(after[:kept])]
        if len(encoder(cut)[0]) <= max_length:
            return cut
    raise ConfigError(f"{len(gap)} new tokens leave no room for a prompt in the {max_length} tokens that the model "
                      "takes")


def _settled(segments: list[list[Segment]],
             settle: Callable[[list[list[Segment]]], list[list[Segment]]]) -> list[list[Segment]]:
    """The pieces, ranges of one length as that length and others settled."""
    segments = [[segment[0] if isinstance(segment, range) and len(segment) == 1 else segment for segment in text]
              for text in segments]
    open_ = [number for number, text in enumerate(segments) if any(isinstance(segment, range) for segment in text)]
    for number, text in zip(open_, settle([segments[number] for number in open_]) if open_ else [], strict=True):
        segments[number] = text
    return segments


# ---- Whether a model of ours, at the likeliest tokens, writes a given continuation: what lm-eval calls `is_greedy`.


def make_greedy(model: Transformer, *, autoregressive: bool, diffusion: DiffusionSpec,
                bos_token_id: int | None = None, batch_size: int = 16, mesh: Mesh | None = None) -> Greedy:
    """A `Greedy` by writing as many tokens as each continuation has, and comparing.

    From left to right the likeliest token is taken each time. A diffusion model begins with that many masks behind the
    context and reveals the token it is surest of, one a forward pass: so it is told how long the answer is, as in
    LLaDA's evaluation (arXiv 2502.09992). Nothing is drawn, so there is no seed, and an answer does not depend on the
    other pairs or the batch size.

    Args:
      bos_token_id: stands before every context; None: nothing does.
      batch_size: rows at a time.
      mesh: splits a batch over devices.

    Raises:
      DataError: a pair does not fit the model, or has neither BOS nor a context.
    """
    length = model.config.max_length
    config = (SamplerConfig(policy="autoregressive", temperature=0.0) if autoregressive
              else SamplerConfig(policy="confidence", temperature=0.0, num_steps=length))  # at most one a token
    spec = SamplingSpec(config, diffusion)
    head = [] if bos_token_id is None else [bos_token_id]

    def greedy(pairs: Sequence[Pair]) -> list[bool]:
        rows = [[*head, *pair.context, *[GAP] * len(pair.continuation)] for pair in pairs]
        keys = example_keys(0, jnp.zeros(len(rows), jnp.uint32))
        written = sample_rows(model, rows, keys, spec, batch_size=batch_size, mesh=mesh)
        return [tuple(row[len(row) - len(pair.continuation) :].tolist()) == tuple(pair.continuation)
                for row, pair in zip(written, pairs, strict=True)]

    return greedy


# ---- Free writing: how likely a judge finds what a model wrote, and how varied all of it is.
#
# Neither says much alone: repetition is likely, and noise is varied.


SIZES = (1, 2, 3)  # of the n-grams of distinct-n


def opening(fields: Fields, release: bool) -> Item:
    """{prompt}, perhaps empty; or {text}, of which the first sentence is the prompt."""
    del release
    if "prompt" in fields:
        if not isinstance(fields["prompt"], str):
            raise BadRecord("no text under 'prompt'")
        return Item(prompt=fields["prompt"])
    return Item(prompt=cut(get_text(fields, "text"), "sentence"))


def distinct(texts: Iterable[str], n: int) -> float:
    """distinct-n of all texts together: how many different n-grams of words there are, by how many there are at all
    (Li et al., arXiv 1510.03055); words are what stands between spaces, in lower case.

    Raises:
      DataError: no text has n words.
    """
    grams = [gram for text in texts for words in [text.lower().split()]
             for gram in zip(*(words[start:] for start in range(n)), strict=False)]
    if not grams:
        raise DataError(f"no text has {n} words, so that there is no distinct-{n}")
    return len(set(grams)) / len(grams)


def varied(texts: Sequence[str]) -> dict[str, float]:
    """distinct-1, -2, -3, those of which there are any."""
    longest = max((len(text.split()) for text in texts), default=0)
    return {f"distinct_{n}": distinct(texts, n) for n in SIZES if n <= longest}
