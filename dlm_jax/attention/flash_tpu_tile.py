"""One tile of the square as the TPU flash kernels see it: where it lies, what it may see, what it scores.

The kernels work on arrays whose last dimension is the length, [batch, heads, head_dim, length], and on transposed
tiles, [block_k, block_q]. Whatever belongs to a query - its maximum, its logsumexp, its segment - is then a row along
the lanes, in the registers as in memory, and a head_dim of 64 or 80 wastes no lane of 128.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dlm_jax.attention.hashing import below, counter_hash, threshold
from dlm_jax.attention.rule import Numbers, Rule, Span

NOTHING = -1e30  # the running maximum, and the logsumexp, of a query that has seen nothing
_FORBIDDEN = -2e30  # below NOTHING, so that a forbidden pair has probability exp(-1e30) = 0 even there


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a kernel is compiled for."""

    rule: Rule
    groups: int  # query heads a key head
    block_q: int
    block_k: int
    dropout_rate: float
    interpret: bool


class Scalars(NamedTuple):
    """What a kernel knows before it reads a tile; int32, in scalar memory."""

    offsets: jax.Array  # [2]: the position of the first query and of the first key
    numbers: jax.Array  # [batch, 4]: `Numbers`
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
        self.numbers = Numbers(*(scalars.numbers[example, i] for i in range(len(Numbers._fields))))

    def extent(self) -> tuple[jax.Array, jax.Array]:
        """Whether the tile may allow a pair, and whether it allows all of them."""
        queries = Span(self.first_query, self.first_query + self.plan.block_q - 1)
        keys = Span(self.first_key, self.first_key + self.plan.block_k - 1)
        if not self.plan.rule.segments:
            return self.plan.rule.extent(queries, keys, self.numbers)
        query_segments, key_segments = (
            Span(ref[self.example, 2 * tile], ref[self.example, 2 * tile + 1])
            for ref, tile in ((self.scalars.query_segments, self.query_tile),
                              (self.scalars.key_segments, self.key_tile)))
        return self.plan.rule.extent(queries, keys, self.numbers, query_segments, key_segments)

    def visit(self, step: Callable[[bool], None]) -> None:
        """Runs `step(masked)`, without the mask where the whole tile is allowed, not at all where none of it is."""
        some, every = self.extent()
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
        if self.plan.rule.segments:
            query_segments = tensors.query_segments[...]
            key_segments = tensors.key_segments[...].T
        allowed = self.plan.rule.allowed(*self.positions(), self.numbers, query_segments, key_segments)
        return jnp.where(allowed, scores, _FORBIDDEN)

    def dropout(self, x: jax.Array) -> jax.Array:
        """Zeroes what the dense backend's dropout zeroes of `x` [block_k, block_q], and makes up for it in the rest."""
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


class Blocks:
    """How arrays are cut, for a kernel whose grid `place` maps to (example, head, query tile, key tile)."""

    def __init__(self, plan: Plan, head_dim: int, place: Callable[..., tuple[jax.Array, ...]]):
        def spec(shape: tuple[int | None, ...], index: Callable[..., tuple[jax.Array, ...]]) -> pl.BlockSpec:
            return pl.BlockSpec(shape, lambda *grid: index(*place(*grid)))

        self.query = spec((None, None, head_dim, plan.block_q), lambda b, h, i, j: (b, h, 0, i))
        self.row = spec((None, None, 1, plan.block_q), lambda b, h, i, j: (b, h, 0, i))
        self.key = spec((None, None, head_dim, plan.block_k), lambda b, h, i, j: (b, h // plan.groups, 0, j))
        segments = plan.rule.segments
        self.tensors = Tensors(
            self.query, self.key, self.key,
            spec((None, 1, plan.block_q), lambda b, h, i, j: (b, 0, i)) if segments else None,
            spec((None, 1, plan.block_k), lambda b, h, i, j: (b, 0, j)) if segments else None)
        self.gradient = Gradient(self.query, self.row, self.row)


def over_keys(plan: Plan, b: jax.Array, h: jax.Array, i: jax.Array, j: jax.Array,
              scalars: Scalars) -> tuple[jax.Array, ...]:
    """The `place` of a grid that steps over the tiles of keys; one that is skipped is not fetched either."""
    some, _ = Tile(plan, scalars, b, h, i, j).extent()
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
