"""Flash attention for TPUs: Pallas kernels that evaluate the mask tile by tile, so that no [Q, K] square is stored.

The kernels use arrays whose last dimension is the length, [batch, heads, head_dim, length], and transposed tiles,
[block_k, block_q]. Per-query values (maximum, logsumexp, segment) are then rows along the lanes, in registers as in
memory, and a head_dim of 64 or 80 wastes no lane of 128.
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
from dlm_jax.attention.softcap import soft_cap, soft_cap_gradient
from dlm_jax.errors import ConfigError
from dlm_jax.random import below, counter_hash, threshold

_EMPTY = -1e30  # the running maximum, and the logsumexp, of a query that has seen no key
_FORBIDDEN = -2e30  # below _EMPTY, so that a forbidden pair has probability exp(-1e30) = 0 even there
_LANES = 128


@dataclasses.dataclass(frozen=True)
class Tiling:
    """The largest tile, in queries and keys (multiples of 128 on a TPU), and whether to interpret (slow, for tests)."""

    block_q: int = 512
    block_k: int = 512
    interpret: bool = False


class Offsets(NamedTuple):
    """The index of the first query, key and kv head of a shard in the full arrays."""

    query: jax.Array | int = 0
    key: jax.Array | int = 0
    kv_head: jax.Array | int = 0


class Options(NamedTuple):
    """The keywords that `tpu_attention` and its gradients share; see there."""

    dropout_rate: float = 0.0
    dropout_seeds: jax.Array | None = None
    softcap: float | None = None
    offsets: Offsets = Offsets()
    tiling: Tiling = Tiling()


@dataclasses.dataclass(frozen=True)
class _Static:
    """The values that a kernel is compiled for."""

    spec: MaskSpec
    groups: int  # query heads per key head
    block_q: int
    block_k: int
    dropout_rate: float
    softcap: float | None
    interpret: bool


class _Scalars(NamedTuple):
    """The values that a kernel knows before it reads a tile; int32, in scalar memory."""

    offsets: jax.Array  # [2]: the position of the first query and of the first key
    params: jax.Array  # [batch, 4]: `MaskParams`
    query_segments: jax.Array  # [batch, 2 * query tiles]: the lowest and the highest segment of each
    key_segments: jax.Array  # [batch, 2 * key tiles]
    dropout_state: jax.Array  # [batch, heads]: the hash that dropout continues


class _Tensors(NamedTuple):
    """The inputs of every kernel; inside kernels the blocks of a tile."""

    query: jax.Array  # [batch, heads, head_dim, Q], scaled
    key: jax.Array  # [batch, kv_heads, head_dim, K]
    value: jax.Array  # [batch, kv_heads, head_dim, K]
    query_segments: jax.Array | None  # int32 [batch, 1, Q]
    key_segments: jax.Array | None  # int32 [batch, 1, K]


class _Gradient(NamedTuple):
    """The further inputs of the backward kernels."""

    out: jax.Array  # the gradient of the output, [batch, heads, head_dim, Q]
    logsumexp: jax.Array  # float32 [batch, heads, 1, Q]
    delta: jax.Array  # float32 [batch, heads, 1, Q]: sum over keys of probability times its gradient


def tpu_attention(query: jax.Array, key: jax.Array, value: jax.Array, mask: AttentionMask, *,
                  dropout_rate: float = 0.0, dropout_seeds: jax.Array | None = None, softcap: float | None = None,
                  offsets: Offsets = Offsets(), tiling: Tiling = Tiling(), return_logsumexp: bool = False
                  ) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Computes `xla_attention`; a query that sees nothing gives 0 here, and the mean of the values there.

    The arrays may be shards of the sequence or of the heads, at `offsets`. The mask, its segments and its lengths are
    those of the full sequence. Results over several shards of keys merge by their logsumexps.

    Args:
      query: [batch, Q, heads, head_dim], unscaled.
      key, value: [batch, K, kv_heads, head_dim]; heads is a multiple of kv_heads.
      dropout_seeds: uint32 [batch], or None for no dropout of the probabilities.
      softcap: of the scaled scores; see `soft_cap`.

    Returns:
      [batch, Q, heads, head_dim] in the dtype of `query`; with `return_logsumexp` also the logsumexp of the scores,
      float32 [batch, heads, Q], -1e30 where a query sees nothing.

    Raises:
      ConfigError: the mask is an explicit matrix, or a tile does not fit a TPU.
    """
    options = Options(dropout_rate, dropout_seeds, softcap, offsets, tiling)
    static, scalars, tensors = _prepare(query, key, value, mask, options)
    out, logsumexp = _flash(static, scalars, tensors)
    out = _length_second(out, query.shape[1])
    return (out, logsumexp[:, :, 0, :query.shape[1]]) if return_logsumexp else out


def tpu_attention_gradients(query: jax.Array, key: jax.Array, value: jax.Array, mask: AttentionMask, out: jax.Array,
                            logsumexp: jax.Array, d_out: jax.Array,
                            options: Options = Options()) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns what a shard of the keys adds to the gradients of query, key and value.

    Args:
      out: [batch, Q, heads, head_dim] and logsumexp float32 [batch, heads, Q], over all shards of the keys.
      d_out: the gradient of `out`. The other arguments are those of `tpu_attention`.
    """
    static, scalars, tensors = _prepare(query, key, value, mask, options)
    padding = tensors.query.shape[-1] - query.shape[1]
    logsumexp = jnp.pad(logsumexp, ((0, 0), (0, 0), (0, padding)))[:, :, None]
    out, d_out = (_length_last(x, static.block_q) for x in (out, d_out))
    _, gradients = _flash_backward(static, (scalars, tensors, out, logsumexp), (d_out, jnp.zeros_like(logsumexp)))
    return (_length_second(gradients.query, query.shape[1]) * query.shape[-1] ** -0.5,
            _length_second(gradients.key, key.shape[1]), _length_second(gradients.value, key.shape[1]))


def _prepare(query: jax.Array, key: jax.Array, value: jax.Array, mask: AttentionMask,
             options: Options) -> tuple[_Static, _Scalars, _Tensors]:
    """Turns the arguments of `tpu_attention` into those of the kernels."""
    dropout_rate, dropout_seeds, softcap, offsets, tiling = options
    if mask.spec.kind == "matrix":
        raise ConfigError("the tpu backend evaluates masks by rule: use the xla backend for an explicit matrix")
    if not tiling.interpret and (tiling.block_q % _LANES or tiling.block_k % _LANES):
        raise ConfigError(f"tiles on a TPU are multiples of {_LANES}, got block_q={tiling.block_q} and "
                          f"block_k={tiling.block_k}")
    batch, q_len, heads, head_dim = query.shape
    k_len, kv_heads = key.shape[1], key.shape[2]
    block_q, block_k = _tile_length(q_len, tiling.block_q), _tile_length(k_len, tiling.block_k)
    dropout_rate = 0.0 if dropout_seeds is None else dropout_rate
    spec = dataclasses.replace(mask.spec, lengths=mask.spec.lengths or k_len % block_k > 0)
    static = _Static(spec, heads // kv_heads, block_q, block_k, dropout_rate, softcap, tiling.interpret)

    query_segments = key_segments = None
    query_bounds = key_bounds = jnp.zeros((1, 2), jnp.int32)
    if spec.segments:
        query_segments, query_bounds = _segments(mask.segment_ids, offsets.query, q_len, block_q, batch)
        key_segments, key_bounds = _segments(mask.segment_ids, offsets.key, k_len, block_k, batch)
    params = mask.params()
    params = params._replace(length=jnp.minimum(params.length, offsets.key + k_len))  # excludes the last tile's padding
    dropout_state = jnp.zeros((1, 1), jnp.int32)
    if dropout_rate:
        head = jnp.arange(heads)
        dropout_state = counter_hash(dropout_seeds[:, None], offsets.kv_head + head // static.groups,
                                     head % static.groups)
    scalars = _Scalars(
        offsets=jnp.stack([jnp.asarray(x, jnp.int32) for x in (offsets.query, offsets.key)]),
        params=jnp.stack([jnp.broadcast_to(x.astype(jnp.int32), batch) for x in params], axis=-1),
        query_segments=query_bounds, key_segments=key_bounds, dropout_state=dropout_state.astype(jnp.int32))
    tensors = _Tensors(_length_last(query * head_dim**-0.5, block_q), _length_last(key, block_k),
                       _length_last(value, block_k), query_segments, key_segments)
    return static, scalars, tensors


def _tile_length(length: int, largest: int) -> int:
    """Returns the length of equal tiles, at most `largest`, that cover `length` with the least padding."""
    unit = min(largest, _LANES)
    tiles = pl.cdiv(length, largest)
    return pl.cdiv(pl.cdiv(length, tiles), unit) * unit


def _length_last(x: jax.Array, block: int) -> jax.Array:
    """Turns [batch, length, heads, head_dim] into [batch, heads, head_dim, length padded to full tiles]."""
    return jnp.pad(x.transpose(0, 2, 3, 1), ((0, 0), (0, 0), (0, 0), (0, -x.shape[1] % block)))


def _length_second(x: jax.Array, length: int) -> jax.Array:
    """Inverts `_length_last`."""
    return x[..., :length].transpose(0, 3, 1, 2)


def _segments(segment_ids: jax.Array, offset: jax.Array | int, length: int, block: int,
              batch: int) -> tuple[jax.Array, jax.Array]:
    """Returns the shard's ids, int32 [batch, 1, length in full tiles], and their range per tile [batch, 2 * tiles]."""
    ids = jax.lax.dynamic_slice_in_dim(segment_ids, offset, length, axis=1)
    ids = jnp.pad(ids, ((0, 0), (0, -length % block)), mode="edge")
    ids = jnp.broadcast_to(ids, (batch, ids.shape[1]))
    tiles = ids.reshape(batch, -1, block)
    bounds = jnp.stack([tiles.min(axis=-1), tiles.max(axis=-1)], axis=-1)
    return ids[:, None], bounds.reshape(batch, -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(static: _Static, scalars: _Scalars, tensors: _Tensors) -> tuple[jax.Array, jax.Array]:
    """Returns the output [batch, heads, head_dim, Q] and the logsumexp float32 [batch, heads, 1, Q]."""
    batch, heads, head_dim, q_len = tensors.query.shape
    grid = batch, heads, q_len // static.block_q, tensors.key.shape[-1] // static.block_k
    blocks = _BlockSpecs(static, head_dim, functools.partial(_over_keys, static))
    row = pltpu.VMEM((1, static.block_q), jnp.float32)
    return _launch(
        static, "flash_attention", _forward_kernel, grid, 1, (blocks.tensors,), (blocks.query, blocks.row),
        (jax.ShapeDtypeStruct(tensors.query.shape, tensors.query.dtype),
         jax.ShapeDtypeStruct((batch, heads, 1, q_len), jnp.float32)),
        (row, row, pltpu.VMEM((head_dim, static.block_q), jnp.float32)), scalars, tensors)


def _flash_forward(static: _Static, scalars: _Scalars, tensors: _Tensors):
    out, logsumexp = _flash(static, scalars, tensors)
    return (out, logsumexp), (scalars, tensors, out, logsumexp)


def _flash_backward(static: _Static, saved, gradients: tuple[jax.Array, jax.Array]):
    scalars, tensors, out, logsumexp = saved
    d_out, d_logsumexp = gradients
    # A score's gradient through the logsumexp is its probability, so it is subtracted as delta is.
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=2, keepdims=True) - d_logsumexp
    gradient = _Gradient(d_out, logsumexp, delta)
    dk, dv = _key_value_gradients(static, scalars, tensors, gradient)
    return None, _Tensors(_query_gradient(static, scalars, tensors, gradient), dk, dv, None, None)


_flash.defvjp(_flash_forward, _flash_backward)


def _query_gradient(static: _Static, scalars: _Scalars, tensors: _Tensors, gradient: _Gradient) -> jax.Array:
    """Returns [batch, heads, head_dim, Q]."""
    batch, heads, head_dim, q_len = tensors.query.shape
    grid = batch, heads, q_len // static.block_q, tensors.key.shape[-1] // static.block_k
    blocks = _BlockSpecs(static, head_dim, functools.partial(_over_keys, static))
    return _launch(
        static, "flash_attention_dq", _query_kernel, grid, 1, (blocks.tensors, blocks.gradient), blocks.query,
        jax.ShapeDtypeStruct(tensors.query.shape, tensors.query.dtype),
        (pltpu.VMEM((head_dim, static.block_q), jnp.float32),), scalars, tensors, gradient)


def _key_value_gradients(static: _Static, scalars: _Scalars, tensors: _Tensors,
                         gradient: _Gradient) -> tuple[jax.Array, jax.Array]:
    """Returns two [batch, kv_heads, head_dim, K], summed over the queries and over the heads of a group."""
    batch, kv_heads, head_dim, k_len = tensors.key.shape
    grid = batch, kv_heads, k_len // static.block_k, static.groups, tensors.query.shape[-1] // static.block_q

    def over_queries(b, kv_head, j, group, i, scalars):
        head = kv_head * static.groups + group
        some, _ = _Tile(static, scalars, b, head, i, j).coverage()
        return b, head, jnp.where(some, i, 0), j

    blocks = _BlockSpecs(static, head_dim, over_queries)
    total = pltpu.VMEM((head_dim, static.block_k), jnp.float32)
    return _launch(
        static, "flash_attention_dkv", _key_value_kernel, grid, 2, (blocks.tensors, blocks.gradient),
        (blocks.key, blocks.key), tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (tensors.key, tensors.value)),
        (total, total), scalars, tensors, gradient)


def _forward_kernel(static: _Static, scalars: _Scalars, tensors: _Tensors, out, logsumexp, maximum, total,
                    out_sum) -> None:
    """Steps over the tiles of keys; `maximum` and `total` [1, block_q], `out_sum` [head_dim, block_q]."""
    b, h, i, j = (pl.program_id(axis) for axis in range(4))
    tile = _Tile(static, scalars, b, h, i, j)

    @pl.when(j == 0)
    def _():
        maximum[...] = jnp.full_like(maximum, _EMPTY)
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
        out_sum[...] = out_sum[...] * decay + _product(tensors.value[...], tile.dropout(probabilities), (1, 0))

    @pl.when(j == pl.num_programs(3) - 1)
    def _():
        divisor = jnp.where(total[...] > 0, total[...], 1.0)  # a query that saw nothing gives 0
        out[...] = (out_sum[...] / divisor).astype(out.dtype)
        logsumexp[...] = maximum[...] + jnp.log(divisor)


def _query_kernel(static: _Static, scalars: _Scalars, tensors: _Tensors, gradient: _Gradient, dq, dq_sum) -> None:
    """Steps over the tiles of keys; `dq_sum` [head_dim, block_q]."""
    b, h, i, j = (pl.program_id(axis) for axis in range(4))
    tile = _Tile(static, scalars, b, h, i, j)

    @pl.when(j == 0)
    def _():
        dq_sum[...] = jnp.zeros_like(dq_sum)

    @tile.visit
    def _(masked: bool):
        d_scores, _ = tile.gradients(tensors, gradient, masked)
        dq_sum[...] += _product(tensors.key[...], d_scores, (1, 0))

    @pl.when(j == pl.num_programs(3) - 1)
    def _():
        dq[...] = dq_sum[...].astype(dq.dtype)


def _key_value_kernel(static: _Static, scalars: _Scalars, tensors: _Tensors, gradient: _Gradient, dk, dv, dk_sum,
                      dv_sum) -> None:
    """Steps over the heads of a group and over the tiles of queries; sums [head_dim, block_k]."""
    b, kv_head, j, group, i = (pl.program_id(axis) for axis in range(5))
    tile = _Tile(static, scalars, b, kv_head * static.groups + group, i, j)

    @pl.when((group == 0) & (i == 0))
    def _():
        dk_sum[...] = jnp.zeros_like(dk_sum)
        dv_sum[...] = jnp.zeros_like(dv_sum)

    @tile.visit
    def _(masked: bool):
        d_scores, probabilities = tile.gradients(tensors, gradient, masked)
        dk_sum[...] += _product(tensors.query[...], d_scores, (1, 1))
        dv_sum[...] += _product(gradient.out[...], probabilities, (1, 1))

    @pl.when((group == static.groups - 1) & (i == pl.num_programs(4) - 1))
    def _():
        dk[...] = dk_sum[...].astype(dk.dtype)
        dv[...] = dv_sum[...].astype(dv.dtype)


class _Tile:
    """A tile of queries against a tile of keys, of one example and head."""

    def __init__(self, static: _Static, scalars: _Scalars, example: jax.Array, head: jax.Array, query_tile: jax.Array,
                 key_tile: jax.Array):
        self.static, self.scalars, self.example, self.head = static, scalars, example, head
        self.query_tile, self.key_tile = query_tile, key_tile
        self.first_query = scalars.offsets[0] + query_tile * static.block_q
        self.first_key = scalars.offsets[1] + key_tile * static.block_k
        self.params = MaskParams(*(scalars.params[example, i] for i in range(len(MaskParams._fields))))

    def coverage(self) -> tuple[jax.Array, jax.Array]:
        """Returns whether the tile may allow a pair, and whether it allows every pair."""
        queries = Span(self.first_query, self.first_query + self.static.block_q - 1)
        keys = Span(self.first_key, self.first_key + self.static.block_k - 1)
        segments = ()
        if self.static.spec.segments:
            segments = (Span(ref[self.example, 2 * tile], ref[self.example, 2 * tile + 1])
                        for ref, tile in ((self.scalars.query_segments, self.query_tile),
                                          (self.scalars.key_segments, self.key_tile)))
        return self.static.spec.tile_coverage(queries, keys, self.params, *segments)

    def visit(self, step: Callable[[bool], None]) -> None:
        """Runs `step(masked)`: without the mask if every pair is allowed, not at all if none is."""
        some, every = self.coverage()
        pl.when(every)(lambda: step(False))
        pl.when(some & ~every)(lambda: step(True))

    def positions(self) -> tuple[jax.Array, jax.Array]:
        """Returns the positions of the queries [1, block_q] and of the keys [block_k, 1]."""
        return (self.first_query + jax.lax.broadcasted_iota(jnp.int32, (1, self.static.block_q), 1),
                self.first_key + jax.lax.broadcasted_iota(jnp.int32, (self.static.block_k, 1), 0))

    def scores(self, tensors: _Tensors, masked: bool) -> jax.Array:
        """Returns the scores, float32 [block_k, block_q]."""
        scores = soft_cap(_product(tensors.key[...], tensors.query[...], (0, 0)), self.static.softcap)
        if not masked:
            return scores
        segments = (tensors.query_segments[...], tensors.key_segments[...].T) if self.static.spec.segments else ()
        allowed = self.static.spec.allowed(*self.positions(), self.params, *segments)
        return jnp.where(allowed, scores, _FORBIDDEN)

    def dropout(self, x: jax.Array) -> jax.Array:
        """Drops of `x` [block_k, block_q] what `xla_attention` drops, and rescales the rest."""
        rate = self.static.dropout_rate
        if rate == 0.0:
            return x
        bits = counter_hash(*self.positions(), state=self.scalars.dropout_state[self.example, self.head])
        return jnp.where(below(bits, int(threshold(rate))), 0.0, x * (1.0 / (1.0 - rate)))

    def gradients(self, tensors: _Tensors, gradient: _Gradient, masked: bool) -> tuple[jax.Array, jax.Array]:
        """Returns the gradient of the scores and the probabilities after dropout, float32 [block_k, block_q]."""
        scores = self.scores(tensors, masked)
        probabilities = jnp.exp(scores - gradient.logsumexp[...])
        d_probabilities = self.dropout(_product(tensors.value[...], gradient.out[...], (0, 0)))
        d_scores = probabilities * (d_probabilities - gradient.delta[...])
        return soft_cap_gradient(d_scores, scores, self.static.softcap), self.dropout(probabilities)


class _BlockSpecs:
    """The blocks of each array, for a kernel whose grid `place` maps to (example, head, query tile, key tile)."""

    def __init__(self, static: _Static, head_dim: int, place: Callable[..., tuple[jax.Array, ...]]):
        def spec(shape: tuple[int | None, ...], index: Callable[..., tuple[jax.Array, ...]]) -> pl.BlockSpec:
            return pl.BlockSpec(shape, lambda *grid: index(*place(*grid)))

        self.query = spec((None, None, head_dim, static.block_q), lambda b, h, i, j: (b, h, 0, i))
        self.row = spec((None, None, 1, static.block_q), lambda b, h, i, j: (b, h, 0, i))
        self.key = spec((None, None, head_dim, static.block_k), lambda b, h, i, j: (b, h // static.groups, 0, j))
        segments = static.spec.segments
        self.tensors = _Tensors(
            self.query, self.key, self.key,
            spec((None, 1, static.block_q), lambda b, h, i, j: (b, 0, i)) if segments else None,
            spec((None, 1, static.block_k), lambda b, h, i, j: (b, 0, j)) if segments else None)
        self.gradient = _Gradient(self.query, self.row, self.row)


def _over_keys(static: _Static, b: jax.Array, h: jax.Array, i: jax.Array, j: jax.Array,
               scalars: _Scalars) -> tuple[jax.Array, ...]:
    """Places a grid that steps over the tiles of keys; a skipped tile is not fetched either."""
    some, _ = _Tile(static, scalars, b, h, i, j).coverage()
    return b, h, i, jnp.where(some, j, 0)


def _launch(static: _Static, name: str, kernel: Callable[..., None], grid: tuple[int, ...], sequential: int,
            in_specs: tuple, out_specs: tuple, outputs: tuple, scratch: tuple, *arguments) -> tuple[jax.Array, ...]:
    """Runs a kernel over a grid whose last `sequential` dimensions share its scratch memory."""
    semantics = ("parallel",) * (len(grid) - sequential) + ("arbitrary",) * sequential
    return pl.pallas_call(
        functools.partial(kernel, static), name=name, out_shape=outputs, interpret=static.interpret,
        grid_spec=pltpu.PrefetchScalarGridSpec(num_scalar_prefetch=1, grid=grid, in_specs=in_specs,
                                               out_specs=out_specs, scratch_shapes=scratch),
        compiler_params=pltpu.CompilerParams(dimension_semantics=semantics),
    )(*arguments)


def _product(a: jax.Array, b: jax.Array, over: tuple[int, int]) -> jax.Array:
    """Contracts a dimension of `a` with one of `b`; float32, with `b` first rounded to the dtype of `a`."""
    # Products of bfloat16 are exact in float32, and Mosaic rejects `precision=HIGHEST` here.
    precision = None if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    dimensions = ((over[:1], over[1:]), ((), ()))
    return jax.lax.dot_general(a, b.astype(a.dtype), dimensions, precision, preferred_element_type=jnp.float32)
