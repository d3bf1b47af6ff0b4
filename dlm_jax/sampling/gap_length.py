"""Infers the number of tokens in a gap of which a range is known: the length after which the text continues best.

Every length is tried. The gap is filled with the most likely tokens, the most certain first; then the first tokens
after it are scored from left to right: log p(s_1 .. s_k | before, filling, the rest after). The same tokens are scored
for every length. So no length has an advantage, as short gaps have in the probability of the entire text and long ones
in its mean per token. Nothing is random, so there is no seed.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from tqdm import tqdm

from dlm_jax.attention import AttentionMask
from dlm_jax.config_fields import check_at_least
from dlm_jax.diffusion import DiffusionSpec, token_nll
from dlm_jax.errors import DataError
from dlm_jax.matmul import jit_model
from dlm_jax.models import Transformer
from dlm_jax.parallel import use_mesh
from dlm_jax.random import example_keys
from dlm_jax.sampling.config import SamplerConfig
from dlm_jax.sampling.sampler import sample
from dlm_jax.sampling.spec import SamplingSpec
from dlm_jax.sampling.text import GAP, Segment, pad_rows

NUM_SCORED = 8  # tokens after a gap that are scored

Encode = Callable[[Sequence[Segment]], tuple[list[int], list[range]]]


class Gap(NamedTuple):
    """A gap that may have any of `lengths`, and the tokens before and after it, GAP where there are other gaps."""

    before: Sequence[int]
    after: Sequence[int]
    lengths: range

    def row(self, length: int) -> list[int]:
        return [*self.before, *[GAP] * length, *self.after]


def infer_gap_lengths(model: Transformer, texts: Sequence[Sequence[Segment]], encode: Encode, *,
                      diffusion: DiffusionSpec, batch_size: int = 16,
                      mesh: Mesh | None = None) -> list[list[Segment]]:
    """Returns `texts` with each range replaced by its best length, or by its middle where no text follows the gap.

    The gaps of a text are inferred from left to right; meanwhile the later ones have the middle of their ranges.

    Args:
      texts: each as `text.split_gaps` returns it.
      encode: `text.encode` for a tokenizer.
      batch_size: rows per forward pass; it does not change the result.
      mesh: the devices that hold the model.

    Raises:
      DataError: with its gaps at their longest a text exceeds the model.
    """
    texts = [list(text) for text in texts]
    for number, text in enumerate(texts):
        length = len(encode(text)[0])
        if _first_range(text) is not None and length > model.config.max_length:
            raise DataError(f"text {number} has {length} tokens with its gaps at their longest, and the model takes at "
                            f"most {model.config.max_length}; shorten the text or narrow its ranges")
    while unknown := [(text, index) for text in texts if (index := _first_range(text)) is not None]:
        gaps = []
        for text, index in unknown:
            row, positions = encode([_middle(segment) if isinstance(segment, range) else segment for segment in text])
            at = positions[index // 2]
            gaps.append(Gap(row[: at.start], row[at.stop :], text[index]))
        with use_mesh(mesh):
            scores = continuation_scores(model, gaps, diffusion=diffusion, batch_size=batch_size)
        for (text, index), gap, score in zip(unknown, gaps, scores, strict=True):
            follows = any(token != GAP for token in gap.after)
            text[index] = gap.lengths[int(score.argmax())] if follows else _middle(gap.lengths)
    return texts


def continuation_scores(model: Transformer, gaps: Sequence[Gap], *, diffusion: DiffusionSpec,
                        batch_size: int = 16) -> list[np.ndarray]:
    """Returns, for each length of each gap, the log-probability of what follows: float32 [number of lengths] in nats.

    A length costs `NUM_SCORED` forward passes, and one for each token in the text's gaps.
    """
    check_at_least(batch_size, 1, "batch_size")
    graphdef, params = nnx.split(model)
    spec = SamplingSpec(SamplerConfig("confidence", temperature=0.0), diffusion)
    scores = {(number, length): 0.0 for number, gap in enumerate(gaps) for length in gap.lengths}
    jobs = sorted(scores, key=lambda job: len(gaps[job[0]].row(job[1])))
    batch_size = min(batch_size, len(jobs))
    for start in tqdm(range(0, len(jobs), batch_size), desc="gap lengths", leave=False, disable=None):
        # The last batch repeats jobs to have the shape of the others, so that it needs no program of its own.
        batch = [jobs[n % len(jobs)] for n in range(start, start + batch_size)]
        padded = pad_rows([gaps[number].row(length) for number, length in batch], model.config.max_length)
        keys = example_keys(0, jnp.zeros(batch_size, jnp.uint32))  # without effect at temperature 0
        filled = sample(model, padded.tokens, padded.fixed, padded.lengths, keys, spec).tokens
        positions = np.full((batch_size, NUM_SCORED), padded.tokens.shape[1], np.int32)  # past the row: not scored
        for row, (number, length) in enumerate(batch):
            gap = gaps[number]
            given = [n for n, token in enumerate(gap.after) if token != GAP][:NUM_SCORED]
            positions[row, : len(given)] = len(gap.before) + length + np.array(given, np.int32)
        found = _log_probability(graphdef, params, filled, padded.lengths, positions, diffusion)
        scores.update(zip(batch, np.asarray(found), strict=True))
    return [np.array([scores[number, length] for length in gap.lengths], np.float32) for number, gap in enumerate(gaps)]


@functools.partial(jit_model, static_argnames=("graphdef", "diffusion"))
def _log_probability(graphdef: Any, params: nnx.State, tokens: jax.Array, lengths: jax.Array, positions: jax.Array,
                     diffusion: DiffusionSpec) -> jax.Array:
    """Returns the log-probability of the tokens at `positions` [batch, n], one after another: float32 [batch], nats."""
    model = nnx.merge(graphdef, params)
    attention = AttentionMask.bidirectional().with_lengths(lengths)
    index = jnp.arange(tokens.shape[1])
    hidden = (index == positions[:, :, None]).any(axis=1)

    def advance(seen: jax.Array, at: jax.Array) -> tuple[jax.Array, jax.Array]:
        here = index == at[:, None]
        nll = token_nll(model.hidden(seen, attention), model.unembed, tokens, here, shift=diffusion.shift, chunk_size=1)
        return jnp.where(here, tokens, seen), nll.sum(axis=1)

    _, nll = jax.lax.scan(advance, jnp.where(hidden, diffusion.mask_token_id, tokens), positions.T)
    return -nll.sum(axis=0)


def _first_range(text: Sequence[Segment]) -> int | None:
    return next((index for index, segment in enumerate(text) if isinstance(segment, range)), None)


def _middle(lengths: range) -> int:
    return lengths[(len(lengths) - 1) // 2]
