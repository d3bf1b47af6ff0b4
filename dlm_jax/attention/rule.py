"""The rule behind a mask as a pure function of positions: the same on the whole square and on one tile of it."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dlm_jax.attention.hashing import RESOLUTION, below, counter_hash


class Numbers(NamedTuple):
    """What a rule needs to know of an example: scalars in a kernel, anything that broadcasts elsewhere."""

    threshold: jax.Array  # int32: of 2**24, the chance that annealing opens a later key
    pattern: jax.Array  # uint32: the hash of (seed, example) that annealing goes on from
    length: jax.Array  # int32: keys from here on are padding


class Span(NamedTuple):
    """The smallest and the largest of the positions, or of the segments, of a tile."""

    low: jax.Array
    high: jax.Array


@dataclasses.dataclass(frozen=True)
class Rule:
    """The part of an `AttentionMask` that is known when a program is compiled."""

    kind: str
    block_size: int = 0
    window: int | None = None
    segments: bool = False
    lengths: bool = False

    def allowed(self, q: jax.Array, k: jax.Array, numbers: Numbers, query_segments: jax.Array | None = None,
                key_segments: jax.Array | None = None) -> jax.Array:
        """Whether a query sees a key, bool; the arguments broadcast against each other."""
        match self.kind:
            case "causal":
                allowed = k <= q
            case "bidirectional" | "matrix":  # a matrix belongs to its mask, which narrows this by it
                allowed = jnp.ones(jnp.broadcast_shapes(q.shape, k.shape), bool)
            case "annealed":
                allowed = (k <= q) | below(counter_hash(q, k, state=numbers.pattern), numbers.threshold)
            case "block_causal":
                allowed = k // self.block_size <= q // self.block_size
            case _:
                raise ValueError(f"unknown attention mask kind {self.kind!r}")
        if self.window is not None:
            allowed &= jnp.abs(q - k) < self.window
        if self.segments:
            allowed &= query_segments == key_segments
        if self.lengths:
            allowed &= k < numbers.length
        return allowed

    def extent(self, q: Span, k: Span, numbers: Numbers, query_segments: Span | None = None,
               key_segments: Span | None = None) -> tuple[jax.Array, jax.Array]:
        """What the corners of a tile tell of it: (it may allow something, it allows everything), scalar bools."""
        match self.kind:
            case "causal":
                some, every = k.low <= q.high, k.high <= q.low
            case "bidirectional":
                some = every = jnp.bool_(True)
            case "annealed":
                some = (k.low <= q.high) | (numbers.threshold > 0)
                every = (k.high <= q.low) | (numbers.threshold == RESOLUTION)
            case "block_causal":
                some = k.low // self.block_size <= q.high // self.block_size
                every = k.high // self.block_size <= q.low // self.block_size
            case _:
                raise ValueError(f"attention mask kind {self.kind!r} has no tiles")
        if self.window is not None:
            some &= (k.low - q.high < self.window) & (q.low - k.high < self.window)
            every &= (k.high - q.low < self.window) & (q.high - k.low < self.window)
        if self.segments:
            some &= (query_segments.low <= key_segments.high) & (key_segments.low <= query_segments.high)
            every &= (query_segments.low == key_segments.high) & (key_segments.low == query_segments.high)
        if self.lengths:
            some &= k.low < numbers.length
            every &= k.high < numbers.length
        return some, every
