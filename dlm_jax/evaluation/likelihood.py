"""The likelihood of text: the diffusion bound by Monte Carlo, and the exact autoregressive value.

The bound of one row with n noisable tokens is the expectation over a number of masked tokens l, uniform on
1 .. n, and over which l of them are masked, of (n / l) times the summed cross-entropy of the masked tokens.
This is the integral over time of the training objective, for every noise schedule at once, without its
variance from the number of masked tokens (LLaDA, arXiv 2502.09992, eq. 6; Ou et al., arXiv 2406.03736).
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from dlm_jax.attention import AttentionMask
from dlm_jax.config_fields import check_at_least
from dlm_jax.data.rows import positions_from_starts
from dlm_jax.diffusion import Batch, DiffusionSpec, NoisyBatch, concat_noisy_and_clean, cross_entropy, token_nll
from dlm_jax.errors import ConfigError, DataError
from dlm_jax.matmul import jit_model
from dlm_jax.models import Transformer
from dlm_jax.random import example_keys
from dlm_jax.sampling import pad_rows

_HEAD_CHUNK = 32  # positions per row whose logits exist at one time


@dataclasses.dataclass(frozen=True)
class BoundEstimate:
    """Negative log-likelihood of rows of tokens, or an upper bound on it.

    Attributes:
      nats: summed over all tokens.
      nats_per_token: the same, divided by their number.
      standard_error: Monte Carlo error of `nats_per_token` for these rows; 0 for an exact value.
      num_tokens: number of scored tokens.
      rows: the same for each row.
    """

    nats: float
    nats_per_token: float
    standard_error: float
    num_tokens: int
    rows: tuple[Self, ...] = dataclasses.field(default=(), repr=False)

    @classmethod
    def from_samples(cls, values: np.ndarray, row_tokens: np.ndarray) -> Self:
        """Makes an estimate of `values` [num_samples, num_rows] in nats; sample s is from the s-th of equal strata.

        The error is computed from differences between adjacent strata, which may overstate it.
        """
        values = np.asarray(values, np.float64)
        variance = np.zeros(values.shape[1])
        if len(values) > 1:
            variance = (np.diff(values, axis=0) ** 2).mean(axis=0) / (2 * len(values))
        nats = values.mean(axis=0)
        rows = tuple(map(cls._of, nats, variance, row_tokens))
        return dataclasses.replace(cls._of(nats.sum(), variance.sum(), np.sum(row_tokens)), rows=rows)

    @classmethod
    def _of(cls, nats: float, variance: float, num_tokens: int) -> Self:
        per_token = 1 / max(num_tokens, 1)
        return cls(float(nats), float(nats * per_token), float(variance**0.5 * per_token), int(num_tokens))


@functools.partial(jit_model, static_argnames=("graphdef", "diffusion", "num_samples", "seed"))
def bound_values(graphdef: nnx.GraphDef, params: nnx.State, batch: Batch, sample: jax.Array | int, *,
                 diffusion: DiffusionSpec, num_samples: int, seed: int) -> jax.Array:
    """Returns each row's estimate of the bound, float32 [batch] in nats.

    `sample`, an int or int32 [batch], picks one of `num_samples` strata of the number of masked tokens; the mean
    over all of them is an unbiased estimate of the bound. Noise is fixed by (seed, batch.example_index, sample).
    It runs where its arguments are, on one device or a mesh. Attention is bidirectional, within segments if the batch
    has them. For a block diffusion model the bound is that of its blocks, and each block has its own number of masked
    tokens.
    """
    sample = jnp.broadcast_to(sample, batch.example_index.shape)
    keys = jax.vmap(jax.random.fold_in)(example_keys(seed, batch.example_index), sample)
    if diffusion.blocks is not None:
        return _block_values(nnx.merge(graphdef, params), batch, keys, sample, diffusion, num_samples)
    mask_row = functools.partial(_mask_row, num_samples=num_samples)
    masked, weight = jax.vmap(mask_row)(batch.noisable_mask, keys, sample)
    noised = dataclasses.replace(batch, tokens=jnp.where(masked, diffusion.mask_token_id, batch.tokens))
    nll = _nll(nnx.merge(graphdef, params), noised, batch.tokens, masked, AttentionMask.bidirectional(),
               diffusion.shift)
    return weight * nll.sum(axis=1)


def _block_values(model: Transformer, batch: Batch, keys: jax.Array, sample: jax.Array,
                  diffusion: DiffusionSpec, num_samples: int) -> jax.Array:
    """Returns the bound block by block; each block has a stratum of its own for its number of masked tokens."""
    (rows, length), blocks = batch.tokens.shape, diffusion.blocks
    count = -(-length // blocks.size)
    filled = ((0, 0), (0, count * blocks.size - length))
    noisable_mask = jnp.pad(batch.noisable_mask, filled).reshape(rows, count, blocks.size)
    block_keys = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(keys, jnp.arange(count))
    # Over all samples each block uses every stratum once; within a sample the blocks use different ones.
    strata = (sample[:, None] + jnp.arange(count)) % num_samples
    mask_row = functools.partial(_mask_row, num_samples=num_samples)
    masked, weight = jax.vmap(jax.vmap(mask_row))(noisable_mask, block_keys, strata)
    masked = masked.reshape(rows, -1)[:, :length]
    weights = jnp.repeat(weight, blocks.size, axis=1)[:, :length]
    noisy = NoisyBatch(jnp.where(masked, diffusion.mask_token_id, batch.tokens), batch.tokens, masked,
                       batch.noisable_mask, weights, batch.positions)
    both = concat_noisy_and_clean([noisy], blocks.size, shift=diffusion.shift)
    noised = dataclasses.replace(batch, tokens=both.tokens, positions=both.positions)
    nll = _nll(model, noised, both.targets, both.loss_mask, blocks.training_mask(length), diffusion.shift, both.noised)
    return jnp.sum(both.weights * nll, axis=1)


def _mask_row(noisable_mask: jax.Array, key: jax.Array, sample: jax.Array, *,
              num_samples: int) -> tuple[jax.Array, jax.Array]:
    """Returns a row's masked positions, bool [length], and weight n / l, for l from the given stratum of 1 .. n."""
    total = noisable_mask.sum()
    count_key, order_key = jax.random.split(key)
    fraction = (sample + jax.random.uniform(count_key)) / num_samples
    number = jnp.clip(1 + jnp.floor(fraction * total).astype(jnp.int32), 1, jnp.maximum(total, 1))
    position_keys = jax.vmap(jax.random.fold_in, (None, 0))(order_key, jnp.arange(noisable_mask.shape[0]))
    order = jnp.where(noisable_mask, jax.vmap(jax.random.uniform)(position_keys), 2.0)
    rank = jnp.argsort(jnp.argsort(order))
    return noisable_mask & (rank < number), total / number


def _nll(model: Transformer, batch: Batch, targets: jax.Array, loss_mask: jax.Array, attention: AttentionMask,
         shift: bool, noised: tuple[int, int] | None = None) -> jax.Array:
    """Returns the cross-entropy of `targets` given `batch.tokens`, 0 outside `loss_mask`: float32 [batch, length]."""
    if batch.segment_ids is not None:
        attention = attention.with_segments(batch.segment_ids)
    hidden = model.hidden(batch.tokens, attention, positions=batch.positions, noised=noised)
    return token_nll(hidden, model.unembed, targets, loss_mask, shift=shift)


def check_has_bound(diffusion: DiffusionSpec) -> None:
    """Raises ConfigError for a model that does not learn from masks."""
    if diffusion.blocks is not None and diffusion.blocks.noise != "mask":
        raise ConfigError("this model was trained on blocks of random tokens, so that it has no bound; score it with "
                          "objective autoregressive")


def bound(model: Transformer, tokens: np.ndarray, noisable_mask: np.ndarray, *, diffusion: DiffusionSpec,
          num_samples: int = 128, seed: int = 0, batch_size: int = 16,
          segment_ids: np.ndarray | None = None) -> BoundEstimate:
    """Returns the diffusion model's upper bound on the negative log-likelihood of rows.

    Args:
      tokens: int [num_rows, length].
      noisable_mask: bool [num_rows, length], the tokens to score; the others and position 0 are context.
      diffusion: mask token, shift and blocks of the model.
      num_samples: forward passes per row, at least 2.
      batch_size: rows in one forward pass; it does not change the result.
      segment_ids: int [num_rows, length]; a token sees its own segment only, and positions restart with each. Give
        padding one of its own.
    """
    check_at_least(num_samples, 2, "num_samples")  # for an error estimate
    check_has_bound(diffusion)
    rows = _as_batch(tokens, noisable_mask, segment_ids)
    row, sample = (x.ravel() for x in np.meshgrid(np.arange(len(tokens)), np.arange(num_samples)))
    values_of = functools.partial(bound_values, *nnx.split(model), diffusion=diffusion, num_samples=num_samples,
                                  seed=seed)
    values = _in_batches(values_of, rows, row, sample, batch_size, "bound")
    return BoundEstimate.from_samples(values.reshape(num_samples, len(tokens)), rows.noisable_mask.sum(axis=1))


def autoregressive_nll(model: Transformer, tokens: np.ndarray, noisable_mask: np.ndarray, *, batch_size: int = 16,
                       segment_ids: np.ndarray | None = None) -> BoundEstimate:
    """Returns the exact negative log-likelihood under causal attention; arguments as in `bound`."""
    rows = _as_batch(tokens, noisable_mask, segment_ids)
    values_of = functools.partial(_autoregressive_values, *nnx.split(model))
    row = np.arange(len(tokens))
    values = _in_batches(values_of, rows, row, row, batch_size, "likelihood")
    return BoundEstimate.from_samples(values[None], rows.noisable_mask.sum(axis=1))


@functools.partial(jit_model, static_argnames="graphdef")
def _autoregressive_values(graphdef: nnx.GraphDef, params: nnx.State, batch: Batch, sample: jax.Array) -> jax.Array:
    del sample  # the value is exact
    model = nnx.merge(graphdef, params)
    return _nll(model, batch, batch.tokens, batch.noisable_mask, AttentionMask.causal(), shift=True).sum(axis=1)


class TokenLogProbs(NamedTuple):
    """What an autoregressive model predicts at each position of a row, given the tokens before it; 0 at position 0.

    Attributes:
      log_probs: float32 [length], of the row's own tokens, in nats.
      top_tokens: int32 [length, num_top], the most likely tokens.
      top_log_probs: float32 [length, num_top].
    """

    log_probs: np.ndarray
    top_tokens: np.ndarray
    top_log_probs: np.ndarray


def token_log_probs(model: Transformer, rows: Sequence[Sequence[int]], num_top: int) -> list[TokenLogProbs]:
    """Returns the log-probabilities of the tokens of rows under causal attention, by one forward pass.

    Raises:
      DataError: a row is too long for the model.
    """
    number = 1 << (len(rows) - 1).bit_length()  # rows are repeated, so that few numbers have a program of their own
    padded = pad_rows([rows[i % len(rows)] for i in range(number)], model.config.max_length, coarse=True)
    found = jax.tree.map(np.asarray, _token_log_probs(*nnx.split(model), padded.tokens, padded.lengths, num_top))
    return [TokenLogProbs(*(array[i, : len(row)] for array in found)) for i, row in enumerate(rows)]


@functools.partial(jit_model, static_argnames=("graphdef", "num_top"))
def _token_log_probs(graphdef: nnx.GraphDef, params: nnx.State, tokens: jax.Array, lengths: jax.Array,
                     num_top: int) -> TokenLogProbs:
    model = nnx.merge(graphdef, params)
    hidden = model.hidden(tokens, AttentionMask.causal().with_lengths(lengths))
    width = tokens.shape[1]
    chunks = -(-width // _HEAD_CHUNK)

    def split(x: jax.Array) -> jax.Array:
        """[batch, width, ...] to [chunks, batch, _HEAD_CHUNK, ...]."""
        x = jnp.pad(x, ((0, 0), (0, chunks * _HEAD_CHUNK - width), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(len(x), chunks, _HEAD_CHUNK, *x.shape[2:]), 1, 0)

    def visit(chunk: tuple[jax.Array, jax.Array]) -> TokenLogProbs:
        logits = model.unembed(chunk[0])
        values, best = jax.lax.top_k(logits, num_top)
        # The same subtraction as in `cross_entropy`: a token that is the most likely has exactly that value.
        return TokenLogProbs(-cross_entropy(logits, chunk[1]), best,
                             values - jax.nn.logsumexp(logits, axis=-1, keepdims=True))

    def join(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x, 0, 1)
        x = jnp.roll(x.reshape(len(x), chunks * _HEAD_CHUNK, *x.shape[3:])[:, :width], 1, axis=1)
        return x.at[:, 0].set(0)

    return jax.tree.map(join, jax.lax.map(visit, (split(hidden), split(jnp.roll(tokens, -1, axis=1)))))


def _as_batch(tokens: np.ndarray, noisable_mask: np.ndarray, segment_ids: np.ndarray | None) -> Batch:
    """Returns all rows as one batch of NumPy arrays; position 0 is always context, so it is not scored."""
    scorable = np.array(noisable_mask, bool)
    scorable[:, 0] = False
    if not scorable.any():
        raise DataError("there is no token to score: every row holds at most its context, position 0")
    positions = None
    if segment_ids is not None:
        segment_ids = np.asarray(segment_ids, np.int32)
        positions = positions_from_starts(np.diff(segment_ids, axis=1, prepend=segment_ids[:, :1] - 1) != 0)
    return Batch(np.asarray(tokens, np.int32), scorable, np.arange(len(tokens), dtype=np.uint32), segment_ids,
                 positions)


def _in_batches(values_of: Callable[[Batch, jax.Array], jax.Array], rows: Batch, row: np.ndarray, sample: np.ndarray,
                batch_size: int, name: str) -> np.ndarray:
    """Evaluates pairs (row, sample), `batch_size` at a time; the last batch is filled up with repetitions."""
    check_at_least(batch_size, 1, "batch_size")
    batch_size = min(batch_size, len(row))
    values = []
    for start in tqdm(range(0, len(row), batch_size), desc=name, leave=False, disable=None):
        at = np.arange(start, start + batch_size) % len(row)
        batch = jax.tree.map(lambda x, at=at: jnp.asarray(x[row[at]]), rows)
        values.append(values_of(batch, jnp.asarray(sample[at], jnp.int32)))
    return np.concatenate([np.asarray(x) for x in values])[: len(row)]
