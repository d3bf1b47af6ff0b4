"""Flash attention for TPU: a Pallas kernel that evaluates the mask tile by tile, so that no square is ever stored."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dlm_jax.attention.flash_tpu_backward import key_value_gradients, query_gradient
from dlm_jax.attention.flash_tpu_tile import (
    NOTHING,
    Blocks,
    Gradient,
    Plan,
    Scalars,
    Tensors,
    Tile,
    launch,
    over_keys,
    product,
)
from dlm_jax.attention.hashing import counter_hash
from dlm_jax.attention.mask import AttentionMask
from dlm_jax.errors import ConfigError

_LANES = 128


def flash_attention_tpu(query: jax.Array, key: jax.Array, value: jax.Array, mask: AttentionMask, *,
                        dropout_rate: float = 0.0, dropout_seeds: jax.Array | None = None,
                        query_offset: jax.Array | int = 0, key_offset: jax.Array | int = 0,
                        kv_head_offset: jax.Array | int = 0, return_residuals: bool = False, block_q: int = 512,
                        block_k: int = 512, interpret: bool = False) -> jax.Array | tuple[jax.Array, jax.Array]:
    """`dense_attention`, but for a query that sees nothing, which gives 0 here and the mean of the values there.

    The arrays may be a shard of the sequence or of the heads: the offsets say where it starts. The mask, its segments
    and its lengths are those of the whole sequence. Parts over several shards of keys merge by their logsumexps.

    Args:
      query: [batch, Q, heads, head_dim], already free of any scale.
      key, value: [batch, K, kv_heads, head_dim]; heads is a multiple of kv_heads.
      dropout_seeds: uint32 [batch], or None for no dropout of the probabilities.
      block_q, block_k: the largest tile, in queries and keys; a multiple of 128 on a TPU.
      interpret: runs the kernels without a TPU, slowly, for tests.

    Returns:
      [batch, Q, heads, head_dim] in the type of `query`; with `return_residuals` also the logsumexp of the scores,
      float32 [batch, heads, Q], -1e30 where a query sees nothing.
    """
    plan, scalars, tensors = _prepare(query, key, value, mask, dropout_rate, dropout_seeds, query_offset, key_offset,
                                      kv_head_offset, block_q, block_k, interpret)
    out, logsumexp = _attention(plan, scalars, tensors)
    out = _length_second(out, query.shape[1])
    return (out, logsumexp[:, :, 0, :query.shape[1]]) if return_residuals else out


def flash_attention_tpu_gradients(
        query: jax.Array, key: jax.Array, value: jax.Array, mask: AttentionMask, out: jax.Array, logsumexp: jax.Array,
        d_out: jax.Array, *, dropout_rate: float = 0.0, dropout_seeds: jax.Array | None = None,
        query_offset: jax.Array | int = 0, key_offset: jax.Array | int = 0, kv_head_offset: jax.Array | int = 0,
        block_q: int = 512, block_k: int = 512, interpret: bool = False) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What a shard of the keys adds to the gradients of query, key and value, given the whole attention's results.

    Args:
      out: [batch, Q, heads, head_dim] and logsumexp float32 [batch, heads, Q], over all shards of the keys.
      d_out: the gradient of `out`. The other arguments are those of `flash_attention_tpu`.
    """
    plan, scalars, tensors = _prepare(query, key, value, mask, dropout_rate, dropout_seeds, query_offset, key_offset,
                                      kv_head_offset, block_q, block_k, interpret)
    padding = tensors.query.shape[-1] - query.shape[1]
    logsumexp = jnp.pad(logsumexp, ((0, 0), (0, 0), (0, padding)))[:, :, None]
    out, d_out = (_length_last(x, plan.block_q) for x in (out, d_out))
    _, gradients = _backward(plan, (scalars, tensors, out, logsumexp), (d_out, jnp.zeros_like(logsumexp)))
    return (_length_second(gradients.query, query.shape[1]) * query.shape[-1] ** -0.5,
            _length_second(gradients.key, key.shape[1]), _length_second(gradients.value, key.shape[1]))


def _prepare(query: jax.Array, key: jax.Array, value: jax.Array, mask: AttentionMask, dropout_rate: float,
             dropout_seeds: jax.Array | None, query_offset: jax.Array | int, key_offset: jax.Array | int,
             kv_head_offset: jax.Array | int, block_q: int, block_k: int,
             interpret: bool) -> tuple[Plan, Scalars, Tensors]:
    """From the arguments of `flash_attention_tpu` to what the kernels take."""
    if mask.kind == "matrix":
        raise ConfigError("the TPU flash kernel evaluates masks by rule: use the dense backend for an explicit matrix")
    if not interpret and (block_q % _LANES or block_k % _LANES):
        raise ConfigError(f"tiles on a TPU are multiples of {_LANES}, got block_q={block_q} and block_k={block_k}")
    batch, q_len, heads, head_dim = query.shape
    k_len, kv_heads = key.shape[1], key.shape[2]
    block_q, block_k = _tile_length(q_len, block_q), _tile_length(k_len, block_k)
    dropout_rate = 0.0 if dropout_seeds is None else dropout_rate
    rule = dataclasses.replace(mask.rule, lengths=mask.rule.lengths or k_len % block_k > 0)
    plan = Plan(rule, heads // kv_heads, block_q, block_k, dropout_rate, interpret)

    query_segments = key_segments = None
    query_bounds = key_bounds = jnp.zeros((1, 2), jnp.int32)
    if rule.segments:
        query_segments, query_bounds = _segments(mask.segment_ids, query_offset, q_len, block_q, batch)
        key_segments, key_bounds = _segments(mask.segment_ids, key_offset, k_len, block_k, batch)
    numbers = mask.numbers()
    numbers = numbers._replace(length=jnp.minimum(numbers.length, key_offset + k_len))  # what fills the last tile
    streams = jnp.zeros((1, 1), jnp.int32)
    if dropout_rate:
        head = jnp.arange(heads)
        streams = counter_hash(dropout_seeds[:, None], kv_head_offset + head // plan.groups, head % plan.groups)
    scalars = Scalars(
        offsets=jnp.stack([jnp.asarray(x, jnp.int32) for x in (query_offset, key_offset)]),
        numbers=jnp.stack([jnp.broadcast_to(x.astype(jnp.int32), batch) for x in numbers], axis=-1),
        query_segments=query_bounds, key_segments=key_bounds, streams=streams.astype(jnp.int32))
    tensors = Tensors(_length_last(query * head_dim**-0.5, block_q), _length_last(key, block_k),
                      _length_last(value, block_k), query_segments, key_segments)
    return plan, scalars, tensors


def _tile_length(length: int, largest: int) -> int:
    """The length of equal tiles no longer than `largest` that cover `length` with the least padding."""
    unit = min(largest, _LANES)
    tiles = pl.cdiv(length, largest)
    return pl.cdiv(pl.cdiv(length, tiles), unit) * unit


def _length_last(x: jax.Array, block: int) -> jax.Array:
    """[batch, length, heads, head_dim] to [batch, heads, head_dim, length filled up to whole tiles]."""
    return jnp.pad(x.transpose(0, 2, 3, 1), ((0, 0), (0, 0), (0, 0), (0, -x.shape[1] % block)))


def _length_second(x: jax.Array, length: int) -> jax.Array:
    """The way back: [batch, heads, head_dim, length filled up] to [batch, length, heads, head_dim]."""
    return x[..., :length].transpose(0, 3, 1, 2)


def _segments(segment_ids: jax.Array, offset: jax.Array | int, length: int, block: int,
              batch: int) -> tuple[jax.Array, jax.Array]:
    """The shard's ids, int32 [batch, 1, length in whole tiles], and their range in each tile [batch, 2 * tiles]."""
    ids = jax.lax.dynamic_slice_in_dim(segment_ids, offset, length, axis=1)
    ids = jnp.pad(ids, ((0, 0), (0, -length % block)), mode="edge")
    ids = jnp.broadcast_to(ids, (batch, ids.shape[1]))
    tiles = ids.reshape(batch, -1, block)
    bounds = jnp.stack([tiles.min(axis=-1), tiles.max(axis=-1)], axis=-1)
    return ids[:, None], bounds.reshape(batch, -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(plan: Plan, scalars: Scalars, tensors: Tensors) -> tuple[jax.Array, jax.Array]:
    """The output [batch, heads, head_dim, Q] and the logsumexp float32 [batch, heads, 1, Q]."""
    batch, heads, head_dim, q_len = tensors.query.shape
    k_tiles = tensors.key.shape[-1] // plan.block_k

    blocks = Blocks(plan, head_dim, functools.partial(over_keys, plan))
    row = pltpu.VMEM((1, plan.block_q), jnp.float32)
    return launch(
        plan, "flash_attention", functools.partial(_kernel, plan), (batch, heads, q_len // plan.block_q, k_tiles), 1,
        (blocks.tensors,), (blocks.query, blocks.row),
        (jax.ShapeDtypeStruct(tensors.query.shape, tensors.query.dtype),
         jax.ShapeDtypeStruct((batch, heads, 1, q_len), jnp.float32)),
        (row, row, pltpu.VMEM((head_dim, plan.block_q), jnp.float32)), scalars, tensors)


def _kernel(plan: Plan, scalars: Scalars, tensors: Tensors, out, logsumexp, maximum, total, out_sum) -> None:
    """Steps over the tiles of keys; `maximum` and `total` [1, block_q], `out_sum` [head_dim, block_q]."""
    b, h, i, j = (pl.program_id(axis) for axis in range(4))
    tile = Tile(plan, scalars, b, h, i, j)

    @pl.when(j == 0)
    def _():
        maximum[...] = jnp.full_like(maximum, NOTHING)
        total[...] = jnp.zeros_like(total)
        out_sum[...] = jnp.zeros_like(out_sum)

    @tile.visit
    def _(masked: bool):
        scores = tile.scores(tensors, masked)
        larger = jnp.maximum(maximum[...], jnp.max(scores, axis=0, keepdims=True))
        probabilities = jnp.exp(scores - larger)
        decay = jnp.exp(maximum[...] - larger)
        maximum[...] = larger
        total[...] = total[...] * decay + jnp.sum(probabilities, axis=0, keepdims=True)
        out_sum[...] = out_sum[...] * decay + product(tensors.value[...], tile.dropout(probabilities), (1, 0))

    @pl.when(j == pl.num_programs(3) - 1)
    def _():
        divisor = jnp.where(total[...] > 0, total[...], 1.0)  # a query that saw nothing gives 0
        out[...] = (out_sum[...] / divisor).astype(out.dtype)
        logsumexp[...] = maximum[...] + jnp.log(divisor)


def _forward(plan: Plan, scalars: Scalars, tensors: Tensors):
    out, logsumexp = _attention(plan, scalars, tensors)
    return (out, logsumexp), (scalars, tensors, out, logsumexp)


def _backward(plan: Plan, saved, gradients: tuple[jax.Array, jax.Array]):
    scalars, tensors, out, logsumexp = saved
    d_out, d_logsumexp = gradients
    # A score's gradient by way of the logsumexp is its probability, so it goes where delta is subtracted.
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=2, keepdims=True) - d_logsumexp
    gradient = Gradient(d_out, logsumexp, delta)
    dk, dv = key_value_gradients(plan, scalars, tensors, gradient)
    return None, Tensors(query_gradient(plan, scalars, tensors, gradient), dk, dv, None, None)


_attention.defvjp(_forward, _backward)
