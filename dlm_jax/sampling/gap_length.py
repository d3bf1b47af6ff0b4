"""How many tokens a gap has, where all that is known is a range: the number after which the text goes on best.

Every length is tried. The gap is filled with the likeliest tokens, the surest first, and then the first tokens behind
it are scored from left to right: log p(s_1 .. s_k | before, filling, further behind). Whatever the length, the same
tokens are scored, so that none has the advantage, as short gaps have in the probability of the whole text and long
ones in its mean per token. Nothing is drawn, so there is no seed.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from dlm_jax.attention import AttentionMask
from dlm_jax.diffusion import token_nll
from dlm_jax.errors import ConfigError, DataError
from dlm_jax.models import Transformer
from dlm_jax.random import example_keys
from dlm_jax.sampling import GAP, SamplerConfig, SamplingSpec, pad_rows, sample
from dlm_jax.sampling.text import Segment

NUM_SCORED = 8  # tokens behind a gap by which its length is judged

Encode = Callable[[Sequence[Segment]], tuple[list[int], list[range]]]


class Gap(NamedTuple):
    """A gap that may have any of `lengths`; the tokens `before` and `after` it, GAP where there are other gaps."""

    before: Sequence[int]
    after: Sequence[int]
    lengths: range


def infer_gap_lengths(model: Transformer, texts: Sequence[Sequence[Segment]], encode: Encode, *, mask_token_id: int,
                   shift: bool = True, batch_size: int = 16) -> list[list[Segment]]:
    """`texts` with the best length in the place of every range, or its middle where no text follows the gap.

    The gaps of a text are settled from left to right, while those to come have the middle of their ranges.

    Args:
      texts: each as `sampling.text.split_gaps` cuts it.
      encode: `sampling.text.encode` for a tokenizer.
      batch_size: rows in one forward pass; it does not change the result.

    Raises:
      DataError: with its gaps at their longest a text exceeds the model.
    """
    texts = [list(text) for text in texts]
    for number, text in enumerate(texts):
        length = len(encode(text)[0])
        if _first_range(text) is not None and length > model.config.max_length:
            raise DataError(f"text {number} has {length} tokens with its gaps at their longest, and the model takes at "
                            f"most {model.config.max_length}; shorten the text or narrow its ranges")
    while unsettled := [(text, place) for text in texts if (place := _first_range(text)) is not None]:
        gaps = []
        for text, place in unsettled:
            row, where = encode([_middle(segment) if isinstance(segment, range) else segment for segment in text])
            at = where[place // 2]
            gaps.append(Gap(row[: at.start], row[at.stop :], text[place]))
        scores = continuation_scores(model, gaps, mask_token_id=mask_token_id, shift=shift, batch_size=batch_size)
        for (text, place), gap, found in zip(unsettled, gaps, scores, strict=True):
            follows = any(token != GAP for token in gap.after)
            text[place] = gap.lengths[int(found.argmax())] if follows else _middle(gap.lengths)
    return texts


def continuation_scores(model: Transformer, gaps: Sequence[Gap], *, mask_token_id: int, shift: bool = True,
                        num_scored: int = NUM_SCORED, batch_size: int = 16) -> list[np.ndarray]:
    """For each gap and each of its lengths the log-probability of what follows, float32 [number of lengths] in nats.

    Args:
      num_scored: how many of the tokens behind a gap are scored; the forward passes of each length are these and one
        for each token in the text's gaps.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
    graphdef, params = nnx.split(model)
    spec = SamplingSpec(SamplerConfig("confidence", temperature=0.0), mask_token_id, shift)
    scores = [np.zeros(len(gap.lengths), np.float32) for gap in gaps]
    jobs = [(number, place) for number, gap in enumerate(gaps) for place in range(len(gap.lengths))]
    jobs.sort(key=lambda job: len(_row(gaps[job[0]], job[1])))
    batch_size = min(batch_size, len(jobs))
    for start in tqdm(range(0, len(jobs), batch_size), desc="gap lengths", leave=False, disable=None):
        # The last batch repeats jobs, to have the shape of the others and no program of its own.
        chosen = [jobs[n % len(jobs)] for n in range(start, start + batch_size)]
        padded = pad_rows([_row(gaps[number], place) for number, place in chosen], model.config.max_length)
        keys = example_keys(0, jnp.zeros(batch_size, jnp.uint32))  # of no effect: the likeliest tokens are taken
        filled = sample(model, padded.tokens, padded.fixed, padded.lengths, keys, spec).tokens
        loss_mask = np.full((batch_size, num_scored), padded.tokens.shape[1], np.int32)  # past the row: nowhere
        for row, (number, place) in enumerate(chosen):
            gap = gaps[number]
            known = [n for n, token in enumerate(gap.after) if token != GAP][:num_scored]
            loss_mask[row, : len(known)] = len(gap.before) + gap.lengths[place] + np.array(known, np.int32)
        found = _log_probability(graphdef, params, filled, padded.lengths, loss_mask, mask_token_id, shift)
        for (number, place), value in zip(chosen, np.asarray(found), strict=True):
            scores[number][place] = value
    return scores


@functools.partial(jax.jit, static_argnames=("graphdef", "mask_token_id", "shift"))
def _log_probability(graphdef: Any, params: nnx.State, tokens: jax.Array, lengths: jax.Array, loss_mask: jax.Array,
                     mask_token_id: int, shift: bool) -> jax.Array:
    """Of the tokens at the positions `loss_mask` [batch, number], each after those before it: float32 [batch], nats."""
    model = nnx.merge(graphdef, params)
    attention = AttentionMask.bidirectional().with_lengths(lengths)
    positions = jnp.arange(tokens.shape[1])
    unseen = (positions == loss_mask[:, :, None]).any(axis=1)

    def advance(seen: jax.Array, at: jax.Array) -> tuple[jax.Array, jax.Array]:
        here = positions == at[:, None]
        nll = token_nll(model.hidden(seen, attention), model.unembed, tokens, here, shift=shift, chunk_size=1)
        return jnp.where(here, tokens, seen), nll.sum(axis=1)

    _, nll = jax.lax.scan(advance, jnp.where(unseen, mask_token_id, tokens), loss_mask.T)
    return -nll.sum(axis=0)


def _row(gap: Gap, place: int) -> list[int]:
    return [*gap.before, *[GAP] * gap.lengths[place], *gap.after]


def _first_range(text: Sequence[Segment]) -> int | None:
    return next((place for place, segment in enumerate(text) if isinstance(segment, range)), None)


def _middle(lengths: range) -> int:
    return lengths[(len(lengths) - 1) // 2]
