"""One tile of the square as the TPU flash kernels see it: where it lies, what it may see, what it scores.

The kernels work on arrays whose last dimension is the length, [batch, heads, head_dim, length], and on transposed
tiles, [block_k, block_q]. Whatever belongs to a query - its maximum, its logsumexp, its segment - is then a row along
the lanes, in the registers as in memory, and a head_dim of 64 or 80 wastes no lane of 128.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dlm_jax.attention.mask import AttentionMask, MaskParams, MaskSpec, Span
from dlm_jax.errors import ConfigError
from dlm_jax.random import below, counter_hash, threshold

NOTHING = -1e30  # the running maximum, and the logsumexp, of a query that has seen nothing
_FORBIDDEN = -2e30  # below NOTHING, so that a forbidden pair has probability exp(-1e30) = 0 even there


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a kernel is compiled for."""

    spec: MaskSpec
    groups: int  # query heads a key head
    block_q: int
    block_k: int
    dropout_rate: float
    interpret: bool


class Scalars(NamedTuple):
    """What a kernel knows before it reads a tile; int32, in scalar memory."""

    offsets: jax.Array  # [2]: the position of the first query and of the first key
    params: jax.Array  # [batch, 4]: `MaskParams`
    query_segments: jax.Array  # [batch, 2 * query tiles]: the lowest and the highest segment of each
    key_segments: jax.Array  # [batch, 2 * key tiles]
    streams: jax.Array  # [batch, heads]: the hash that dropout goes on from


class Tensors(NamedTuple):
    """What every kernel reads; the blocks of a tile inside kernels."""

    query: jax.Array  # [batch, heads, head_dim, Q], scaled
    key: jax.Array  # [batch, kv_heads, head_dim, K]
    value: jax.Array  # [batch, kv_heads, head_dim, K]
    query_segments: jax.Array | None  # int32 [batch, 1, Q]
    key_segments: jax.Array | None  # int32 [batch, 1, K]


class Gradient(NamedTuple):
    """What the backward kernels read besides."""

    out: jax.Array  # the gradient of the output, [batch, heads, head_dim, Q]
    logsumexp: jax.Array  # float32 [batch, heads, 1, Q]
    delta: jax.Array  # float32 [batch, heads, 1, Q]: sum over keys of probability times its gradient


class Tile:
    """The piece of one example and head where a tile of queries meets a tile of keys."""

    def __init__(self, plan: Plan, scalars: Scalars, example: jax.Array, head: jax.Array, query_tile: jax.Array,
                 key_tile: jax.Array):
        self.plan, self.scalars, self.example, self.head = plan, scalars, example, head
        self.query_tile, self.key_tile = query_tile, key_tile
        self.first_query = scalars.offsets[0] + query_tile * plan.block_q
        self.first_key = scalars.offsets[1] + key_tile * plan.block_k
        self.params = MaskParams(*(scalars.params[example, i] for i in range(len(MaskParams._fields))))

    def tile_coverage(self) -> tuple[jax.Array, jax.Array]:
        """Whether the tile may allow a pair, and whether it allows all of them."""
        queries = Span(self.first_query, self.first_query + self.plan.block_q - 1)
        keys = Span(self.first_key, self.first_key + self.plan.block_k - 1)
        if not self.plan.spec.segments:
            return self.plan.spec.tile_coverage(queries, keys, self.params)
        query_segments, key_segments = (
            Span(ref[self.example, 2 * tile], ref[self.example, 2 * tile + 1])
            for ref, tile in ((self.scalars.query_segments, self.query_tile),
                              (self.scalars.key_segments, self.key_tile)))
        return self.plan.spec.tile_coverage(queries, keys, self.params, query_segments, key_segments)

    def visit(self, step: Callable[[bool], None]) -> None:
        """Runs `step(masked)`, without the mask where the whole tile is allowed, not at all where none of it is."""
        some, every = self.tile_coverage()
        pl.when(every)(lambda: step(False))
        pl.when(some & ~every)(lambda: step(True))

    def positions(self) -> tuple[jax.Array, jax.Array]:
        """Of the queries [1, block_q] and of the keys [block_k, 1]."""
        return (self.first_query + jax.lax.broadcasted_iota(jnp.int32, (1, self.plan.block_q), 1),
                self.first_key + jax.lax.broadcasted_iota(jnp.int32, (self.plan.block_k, 1), 0))

    def scores(self, tensors: Tensors, masked: bool) -> jax.Array:
        """float32 [block_k, block_q]."""
        scores = product(tensors.key[...], tensors.query[...], (0, 0))
        if not masked:
            return scores
        query_segments = key_segments = None
        if self.plan.spec.segments:
            query_segments = tensors.query_segments[...]
            key_segments = tensors.key_segments[...].T
        allowed = self.plan.spec.allowed(*self.positions(), self.params, query_segments, key_segments)
        return jnp.where(allowed, scores, _FORBIDDEN)

    def dropout(self, x: jax.Array) -> jax.Array:
        """Zeroes what the xla backend's dropout zeroes of `x` [block_k, block_q], and makes up for it in the rest."""
        rate = self.plan.dropout_rate
        if rate == 0.0:
            return x
        bits = counter_hash(*self.positions(), state=self.scalars.streams[self.example, self.head])
        return jnp.where(below(bits, int(threshold(rate))), 0.0, x * (1.0 / (1.0 - rate)))

    def gradients(self, tensors: Tensors, gradient: Gradient, masked: bool) -> tuple[jax.Array, jax.Array]:
        """Of the loss by the scores, and the probabilities after dropout: two float32 [block_k, block_q]."""
        probabilities = jnp.exp(self.scores(tensors, masked) - gradient.logsumexp[...])
        d_probabilities = self.dropout(product(tensors.value[...], gradient.out[...], (0, 0)))
        return probabilities * (d_probabilities - gradient.delta[...]), self.dropout(probabilities)


class TileSizes:
    """How arrays are cut, for a kernel whose grid `place` maps to (example, head, query tile, key tile)."""

    def __init__(self, plan: Plan, head_dim: int, place: Callable[..., tuple[jax.Array, ...]]):
        def spec(shape: tuple[int | None, ...], index: Callable[..., tuple[jax.Array, ...]]) -> pl.BlockSpec:
            return pl.BlockSpec(shape, lambda *grid: index(*place(*grid)))

        self.query = spec((None, None, head_dim, plan.block_q), lambda b, h, i, j: (b, h, 0, i))
        self.row = spec((None, None, 1, plan.block_q), lambda b, h, i, j: (b, h, 0, i))
        self.key = spec((None, None, head_dim, plan.block_k), lambda b, h, i, j: (b, h // plan.groups, 0, j))
        segments = plan.spec.segments
        self.tensors = Tensors(
            self.query, self.key, self.key,
            spec((None, 1, plan.block_q), lambda b, h, i, j: (b, 0, i)) if segments else None,
            spec((None, 1, plan.block_k), lambda b, h, i, j: (b, 0, j)) if segments else None)
        self.gradient = Gradient(self.query, self.row, self.row)


def over_keys(plan: Plan, b: jax.Array, h: jax.Array, i: jax.Array, j: jax.Array,
              scalars: Scalars) -> tuple[jax.Array, ...]:
    """The `place` of a grid that steps over the tiles of keys; one that is skipped is not fetched either."""
    some, _ = Tile(plan, scalars, b, h, i, j).tile_coverage()
    return b, h, i, jnp.where(some, j, 0)


def launch(plan: Plan, name: str, kernel: Callable[..., None], grid: tuple[int, ...], sequential: int,
           in_specs: tuple, out_specs: tuple, outputs: tuple, scratch: tuple, *arguments) -> tuple[jax.Array, ...]:
    """Runs a kernel over a grid whose last `sequential` dimensions share its scratch memory."""
    semantics = ("parallel",) * (len(grid) - sequential) + ("arbitrary",) * sequential
    return pl.pallas_call(
        kernel, name=name, out_shape=outputs, interpret=plan.interpret,
        grid_spec=pltpu.PrefetchScalarGridSpec(num_scalar_prefetch=1, grid=grid, in_specs=in_specs,
                                               out_specs=out_specs, scratch_shapes=scratch),
        compiler_params=pltpu.CompilerParams(dimension_semantics=semantics),
    )(*arguments)


def product(a: jax.Array, b: jax.Array, over: tuple[int, int]) -> jax.Array:
    """Contracts a dimension of `a` with one of `b`; float32, with `b` first rounded to the type of `a`."""
    # Products of bfloat16 are exact in float32, and Mosaic refuses a user's wish for more precision there.
    precision = None if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    dimensions = ((over[:1], over[1:]), ((), ()))
    return jax.lax.dot_general(a, b.astype(a.dtype), dimensions, precision, preferred_element_type=jnp.float32)


# ---- The gradients of TPU flash attention: one kernel for the queries, one for the keys and values.


def query_gradient(plan: Plan, scalars: Scalars, tensors: Tensors, gradient: Gradient) -> jax.Array:
    """[batch, heads, head_dim, Q]."""
    batch, heads, head_dim, q_len = tensors.query.shape
    k_tiles = tensors.key.shape[-1] // plan.block_k

    blocks = TileSizes(plan, head_dim, functools.partial(over_keys, plan))
    return launch(
        plan, "flash_attention_dq", functools.partial(_query_kernel, plan),
        (batch, heads, q_len // plan.block_q, k_tiles), 1, (blocks.tensors, blocks.gradient), blocks.query,
        jax.ShapeDtypeStruct(tensors.query.shape, tensors.query.dtype),
        (pltpu.VMEM((head_dim, plan.block_q), jnp.float32),), scalars, tensors, gradient)


def _query_kernel(plan: Plan, scalars: Scalars, tensors: Tensors, gradient: Gradient, dq, dq_sum) -> None:
    """Steps over the tiles of keys; `dq_sum` [head_dim, block_q]."""
    b, h, i, j = (pl.program_id(axis) for axis in range(4))
    tile = Tile(plan, scalars, b, h, i, j)

    @pl.when(j == 0)
    def _():
        dq_sum[...] = jnp.zeros_like(dq_sum)

    @tile.visit
    def _(masked: bool):
        d_scores, _ = tile.gradients(tensors, gradient, masked)
        dq_sum[...] += product(tensors.key[...], d_scores, (1, 0))

    @pl.when(j == pl.num_programs(3) - 1)
    def _():
        dq[...] = dq_sum[...].astype(dq.dtype)


def key_value_gradients(plan: Plan, scalars: Scalars, tensors: Tensors,
                        gradient: Gradient) -> tuple[jax.Array, jax.Array]:
    """Two [batch, kv_heads, head_dim, K], summed over the queries and over the heads of a group."""
    batch, kv_heads, head_dim, k_len = tensors.key.shape
    q_tiles = tensors.query.shape[-1] // plan.block_q

    def place(b, kv_head, j, group, i, scalars):
        head = kv_head * plan.groups + group
        some, _ = Tile(plan, scalars, b, head, i, j).tile_coverage()
        return b, head, jnp.where(some, i, 0), j

    blocks = TileSizes(plan, head_dim, place)
    total = pltpu.VMEM((head_dim, plan.block_k), jnp.float32)
    return launch(
        plan, "flash_attention_dkv", functools.partial(_key_value_kernel, plan),
        (batch, kv_heads, k_len // plan.block_k, plan.groups, q_tiles), 2, (blocks.tensors, blocks.gradient),
        (blocks.key, blocks.key), tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (tensors.key, tensors.value)),
        (total, total), scalars, tensors, gradient)


def _key_value_kernel(plan: Plan, scalars: Scalars, tensors: Tensors, gradient: Gradient, dk, dv, dk_sum,
                      dv_sum) -> None:
    """Steps over the heads of a group and over the tiles of queries; sums [head_dim, block_k]."""
    b, kv_head, j, group, i = (pl.program_id(axis) for axis in range(5))
    tile = Tile(plan, scalars, b, kv_head * plan.groups + group, i, j)

    @pl.when((group == 0) & (i == 0))
    def _():
        dk_sum[...] = jnp.zeros_like(dk_sum)
        dv_sum[...] = jnp.zeros_like(dv_sum)

    @tile.visit
    def _(masked: bool):
        d_scores, probabilities = tile.gradients(tensors, gradient, masked)
        dk_sum[...] += product(tensors.query[...], d_scores, (1, 1))
        dv_sum[...] += product(gradient.out[...], probabilities, (1, 1))

    @pl.when((group == plan.groups - 1) & (i == pl.num_programs(4) - 1))
    def _():
        dk[...] = dk_sum[...].astype(dk.dtype)
        dv[...] = dv_sum[...].astype(dv.dtype)


# ---- Flash attention for TPU: a Pallas kernel that evaluates the mask tile by tile, so that no square is ever stored.


_LANES = 128


def tpu_attention(query: jax.Array, key: jax.Array, value: jax.Array, mask: AttentionMask, *,
                        dropout_rate: float = 0.0, dropout_seeds: jax.Array | None = None,
                        query_offset: jax.Array | int = 0, key_offset: jax.Array | int = 0,
                        kv_head_offset: jax.Array | int = 0, return_residuals: bool = False, block_q: int = 512,
                        block_k: int = 512, interpret: bool = False) -> jax.Array | tuple[jax.Array, jax.Array]:
    """`xla_attention`, but for a query that sees nothing, which gives 0 here and the mean of the values there.

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


def tpu_attention_gradients(
        query: jax.Array, key: jax.Array, value: jax.Array, mask: AttentionMask, out: jax.Array, logsumexp: jax.Array,
        d_out: jax.Array, *, dropout_rate: float = 0.0, dropout_seeds: jax.Array | None = None,
        query_offset: jax.Array | int = 0, key_offset: jax.Array | int = 0, kv_head_offset: jax.Array | int = 0,
        block_q: int = 512, block_k: int = 512, interpret: bool = False) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What a shard of the keys adds to the gradients of query, key and value, given the whole attention's results.

    Args:
      out: [batch, Q, heads, head_dim] and logsumexp float32 [batch, heads, Q], over all shards of the keys.
      d_out: the gradient of `out`. The other arguments are those of `tpu_attention`.
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
    """From the arguments of `tpu_attention` to what the kernels take."""
    if mask.kind == "matrix":
        raise ConfigError("the TPU flash kernel evaluates masks by rule: use the xla backend for an explicit matrix")
    if not interpret and (block_q % _LANES or block_k % _LANES):
        raise ConfigError(f"tiles on a TPU are multiples of {_LANES}, got block_q={block_q} and block_k={block_k}")
    batch, q_len, heads, head_dim = query.shape
    k_len, kv_heads = key.shape[1], key.shape[2]
    block_q, block_k = _tile_length(q_len, block_q), _tile_length(k_len, block_k)
    dropout_rate = 0.0 if dropout_seeds is None else dropout_rate
    spec = dataclasses.replace(mask.spec, lengths=mask.spec.lengths or k_len % block_k > 0)
    plan = Plan(spec, heads // kv_heads, block_q, block_k, dropout_rate, interpret)

    query_segments = key_segments = None
    query_bounds = key_bounds = jnp.zeros((1, 2), jnp.int32)
    if spec.segments:
        query_segments, query_bounds = _segments(mask.segment_ids, query_offset, q_len, block_q, batch)
        key_segments, key_bounds = _segments(mask.segment_ids, key_offset, k_len, block_k, batch)
    params = mask.params()
    params = params._replace(length=jnp.minimum(params.length, key_offset + k_len))  # what fills the last tile
    streams = jnp.zeros((1, 1), jnp.int32)
    if dropout_rate:
        head = jnp.arange(heads)
        streams = counter_hash(dropout_seeds[:, None], kv_head_offset + head // plan.groups, head % plan.groups)
    scalars = Scalars(
        offsets=jnp.stack([jnp.asarray(x, jnp.int32) for x in (query_offset, key_offset)]),
        params=jnp.stack([jnp.broadcast_to(x.astype(jnp.int32), batch) for x in params], axis=-1),
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

    blocks = TileSizes(plan, head_dim, functools.partial(over_keys, plan))
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
