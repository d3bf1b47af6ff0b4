"""How many tokens a gap has: the posterior over its lengths.

With a uniform prior over the lengths asked about, p(n | text) is proportional to p(after | before, n tokens between):
the same tokens behind the gap are scored whatever n is, so that no length has the advantage. The n tokens between are
marginalised by Monte Carlo: from left to right the model draws them, not knowing what follows at once, and then goes
on to what is written there, whose log-probabilities add up. Tokens further behind are seen throughout.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from scipy.special import logsumexp, softmax
from tqdm import tqdm

from dlm_jax.attention import AttentionMask
from dlm_jax.diffusion import example_keys
from dlm_jax.errors import ConfigError, DataError
from dlm_jax.models import Transformer
from dlm_jax.sampling import GAP, make_canvas
from dlm_jax.sampling.text import Piece

NUM_SCORED = 8  # tokens behind a gap by which its length is judged
NUM_SAMPLES = 8  # what is drawn into a gap of each length
_SITE = 2  # random numbers apart from those of sampling, which has 0 and 1


class Gap(NamedTuple):
    """A gap of unknown length: the tokens `before` and `after` it, GAP in other gaps; and the numbers it may have."""

    before: Sequence[int]
    after: Sequence[int]
    lengths: range

    def row(self, length: int) -> list[int]:
        return [*self.before, *[GAP] * length, *self.after]


def settle_lengths(model: Transformer, texts: Sequence[Sequence[Piece]],
                   encode: Callable[[Sequence[Piece]], tuple[list[int], list[range]]], *, mask_token_id: int,
                   shift: bool = True, seed: int = 0, example_index: Sequence[int] | None = None,
                   batch_size: int = 16) -> list[list[Piece]]:
    """`texts` with a number for every range, the median of its posterior.

    The gaps of a text are settled from left to right, while those to come are of the middle of their ranges.

    Args:
      texts: each as `sampling.text.split_gaps` cuts it.
      encode: from those pieces to a row of tokens and where in it each gap lies.
      seed, example_index: fix what is drawn, as in sampling; 0, 1, 2, ... by default.
      batch_size: rows in one forward pass; it does not change the result.

    Raises:
      DataError: a text would not fit the model with its gaps at their longest.
    """
    texts = [list(text) for text in texts]
    index = range(len(texts)) if example_index is None else example_index
    for number, text in enumerate(texts):
        length = len(encode(text)[0])
        if length > model.config.max_length:
            raise DataError(f"text {number} has {length} tokens with its gaps at their longest, and the model takes at "
                            f"most {model.config.max_length}; shorten the text or narrow its ranges")
    while open_ := [(i, _first_range(text)) for i, text in enumerate(texts) if _first_range(text) is not None]:
        gaps = []
        for i, place in open_:
            row, where = encode([_middle(piece) if isinstance(piece, range) else piece for piece in texts[i]])
            at = where[place // 2]
            gaps.append(Gap(row[: at.start], row[at.stop :], texts[i][place]))
        found = length_posteriors(model, gaps, mask_token_id=mask_token_id, shift=shift, seed=seed,
                                  example_index=[index[i] for i, _ in open_], batch_size=batch_size)
        for (i, place), posterior in zip(open_, found, strict=True):
            texts[i][place] = texts[i][place][int(np.searchsorted(np.cumsum(posterior), 0.5 - 1e-6))]
    return texts


def length_posteriors(model: Transformer, gaps: Sequence[Gap], *, mask_token_id: int, shift: bool = True,
                      num_samples: int = NUM_SAMPLES, num_scored: int = NUM_SCORED, seed: int = 0,
                      example_index: Sequence[int] | None = None, batch_size: int = 16) -> list[np.ndarray]:
    """For each gap the probabilities of its lengths, float64 [number of lengths].

    Args:
      num_samples: what is drawn into the gap of each length; each draw takes as many forward passes as the length and
        `num_scored` together.
      num_scored: how many tokens behind the gap are scored at most. Without any, all lengths are equally likely.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
    index = np.arange(len(gaps)) if example_index is None else np.asarray(example_index)
    keys = jax.vmap(jax.random.fold_in, (0, None))(example_keys(seed, jnp.asarray(index, jnp.uint32)), _SITE)
    jobs = [(number, length, sample) for number, gap in enumerate(gaps) for length in gap.lengths
            for sample in range(num_samples)]
    jobs.sort(key=lambda job: len(gaps[job[0]].before) + job[1] + len(gaps[job[0]].after))
    batch_size = min(batch_size, len(jobs))
    scores = {}
    graphdef, params = nnx.split(model)
    for start in tqdm(range(0, len(jobs), batch_size), desc="gap lengths", leave=False, disable=None):
        # The last batch repeats jobs, to have the shape of the others and no program of its own.
        chosen = [jobs[n % len(jobs)] for n in range(start, start + batch_size)]
        canvas = make_canvas([gaps[number].row(length) for number, length, _ in chosen], model.config.max_length)
        of = np.array([number for number, _, _ in chosen])
        found = _scores(graphdef, params, canvas.tokens, canvas.fixed, canvas.lengths,
                        np.array([len(gaps[number].before) for number in of]),
                        np.array([length for _, length, _ in chosen]), keys[of],
                        np.array([sample for _, _, sample in chosen]),
                        mask_token_id=mask_token_id, shift=shift, num_scored=num_scored)
        scores.update(zip(chosen, np.asarray(found, np.float64), strict=True))
    posteriors = []
    for number, gap in enumerate(gaps):
        drawn = np.array([[scores[number, length, sample] for sample in range(num_samples)] for length in gap.lengths])
        posteriors.append(softmax(logsumexp(drawn, axis=1)))
    return posteriors


@functools.partial(jax.jit, static_argnames=("graphdef", "mask_token_id", "shift", "num_scored"))
def _scores(graphdef: Any, params: nnx.State, tokens: jax.Array, fixed: jax.Array, lengths: jax.Array,
            start: jax.Array, number: jax.Array, keys: jax.Array, sample: jax.Array, *, mask_token_id: int, shift: bool,
            num_scored: int) -> jax.Array:
    """The log-probability [batch] of what stands behind `number` tokens drawn at `start`, int32 [batch]."""
    model = nnx.merge(graphdef, params)
    attention = AttentionMask.bidirectional().with_lengths(lengths)
    keys = jax.vmap(jax.random.fold_in)(keys, sample)
    rows, positions = jnp.arange(len(tokens)), jnp.arange(tokens.shape[1])
    given = jnp.where(fixed, tokens, mask_token_id)
    behind = start + number
    unseen = (positions >= start[:, None]) & (positions < (behind + num_scored)[:, None])
    scored = unseen & (positions >= behind[:, None]) & fixed & (positions < lengths[:, None])

    def advance(step: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """From left to right, one token of each row: drawn in the gap, scored and given behind it."""
        seen, score = state
        at = start + step  # past the row's end: read anywhere, written nowhere
        hidden = model.hidden(seen, attention)
        hidden = jnp.take_along_axis(hidden, (at - shift)[:, None, None], axis=1, mode="clip")
        logits = model.unembed(hidden)[:, 0]  # [batch, vocab]
        target = jnp.take_along_axis(given, at[:, None], axis=1, mode="clip")
        log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), target, axis=1)[:, 0]
        wanted = jnp.take_along_axis(scored, at[:, None], axis=1, mode="fill", fill_value=False)[:, 0]
        # One noise for a step and a sample: what is drawn into gaps of different lengths is alike.
        noise_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, step)
        drawn = jax.vmap(jax.random.categorical)(noise_keys, logits.at[:, mask_token_id].set(-jnp.inf))
        token = jnp.where(step < number, drawn, target[:, 0])
        return seen.at[rows, at].set(token, mode="drop"), score + jnp.where(wanted, log_p, 0.0)

    state = jnp.where(unseen, mask_token_id, given), jnp.zeros(len(tokens))
    return jax.lax.fori_loop(0, number.max() + num_scored, advance, state)[1]


def _first_range(text: Sequence[Piece]) -> int | None:
    return next((place for place, piece in enumerate(text) if isinstance(piece, range)), None)


def _middle(lengths: range) -> int:
    return lengths[(len(lengths) - 1) // 2]
