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
    causal_before: jax.Array  # int32: of the kind block_causal, queries before it see as causal ones do


class Span(NamedTuple):
    """The smallest and the largest of the positions, or of the segments, of a tile."""

    low: jax.Array
    high: jax.Array


@dataclasses.dataclass(frozen=True)
class Rule:
    """The part of an `AttentionMask` that is known when a program is compiled.

    Of the kind `block_diffusion`, which is of several copies of a text one after another, `text_length` is that of one
    copy and `views` how many are noised; a clean one follows them, causal or with `whole_clean` in whole blocks.
    """

    kind: str
    block_size: int = 0
    window: int | None = None
    segments: bool = False
    lengths: bool = False
    text_length: int = 0
    views: int = 0
    whole_clean: bool = False

    def split(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Of indices of several copies: which copy each lies in, and where in its text."""
        copy = sum((x >= number * self.text_length).astype(jnp.int32) for number in range(1, self.views + 1))
        return copy, x - copy * self.text_length

    def allowed(self, q: jax.Array, k: jax.Array, numbers: Numbers, query_segments: jax.Array | None = None,
                key_segments: jax.Array | None = None) -> jax.Array:
        """Whether a query sees a key, bool; the arguments broadcast against each other."""
        if self.kind == "block_diffusion":
            (q_copy, q), (k_copy, k) = self.split(q), self.split(k)
        match self.kind:
            case "causal":
                allowed = k <= q
            case "bidirectional" | "matrix":  # a matrix belongs to its mask, which narrows this by it
                allowed = jnp.ones(jnp.broadcast_shapes(q.shape, k.shape), bool)
            case "annealed":
                allowed = (k <= q) | below(counter_hash(q, k, state=numbers.pattern), numbers.threshold)
            case "block_causal":
                allowed = k <= self._block_end(q, numbers)
            case "block_diffusion":
                q_block, k_block = q // self.block_size, k // self.block_size
                q_clean, k_clean = q_copy == self.views, k_copy == self.views
                # A noised block sees itself whole and what is clean before it.
                # (Blocks are numbered through the copies and truths are joined, neither compared nor chosen between:
                # the TPU's compiler refuses that of whole tiles.)
                count = -(-self.text_length // self.block_size)
                allowed = (q_copy * count + q_block == k_copy * count + k_block) & ~k_clean
                before = k_block <= q_block if self.whole_clean else k <= q
                allowed |= k_clean & ((~q_clean & (k_block < q_block)) | (q_clean & before))
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
        if self.kind == "block_diffusion":
            (some, every), q, k = self._extent_of_copies(q, k)
            return self._narrowed(some, every, q, k, numbers, query_segments, key_segments)
        match self.kind:
            case "causal":
                some, every = k.low <= q.high, k.high <= q.low
            case "bidirectional":
                some = every = jnp.bool_(True)
            case "annealed":
                some = (k.low <= q.high) | (numbers.threshold > 0)
                every = (k.high <= q.low) | (numbers.threshold == RESOLUTION)
            case "block_causal":
                some, every = k.low <= self._block_end(q.high, numbers), k.high <= self._block_end(q.low, numbers)
            case _:
                raise ValueError(f"attention mask kind {self.kind!r} has no tiles")
        return self._narrowed(some, every, q, k, numbers, query_segments, key_segments)

    def _block_end(self, q: jax.Array, numbers: Numbers) -> jax.Array:
        """The last key that a query of the kind `block_causal` sees; it never falls as `q` grows."""
        return jnp.where(q < numbers.causal_before, q, q // self.block_size * self.block_size + self.block_size - 1)

    def _narrowed(self, some: jax.Array, every: jax.Array, q: Span, k: Span, numbers: Numbers,
                  query_segments: Span | None, key_segments: Span | None) -> tuple[jax.Array, jax.Array]:
        """`extent` after what narrows every kind."""
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

    def _extent_of_copies(self, q: Span, k: Span) -> tuple[tuple[jax.Array, jax.Array], Span, Span]:
        """`extent` of the kind `block_diffusion`, and the spans in the text; a tile may lie across several copies."""
        (q_first, q_low), (q_last, q_high) = self.split(q.low), self.split(q.high)
        (k_first, k_low), (k_last, k_high) = self.split(k.low), self.split(k.high)
        text = Span(jnp.int32(0), jnp.int32(self.text_length - 1))
        q_whole, k_whole = q_first == q_last, k_first == k_last
        # Across copies a tile reaches from the middle of one text to the middle of another: taken as all of it.
        q = Span(jnp.where(q_whole, q_low, text.low), jnp.where(q_whole, q_high, text.high))
        k = Span(jnp.where(k_whole, k_low, text.low), jnp.where(k_whole, k_high, text.high))
        q_block, k_block = (Span(x.low // self.block_size, x.high // self.block_size) for x in (q, k))
        same = (q_first <= k_last) & (k_first <= q_last)
        q_noised, k_clean = q_first < self.views, k_last == self.views
        meet = (k_block.low <= q_block.high) & (q_block.low <= k_block.high)
        some = (same & q_noised & (k_first < self.views) & meet) | (q_noised & k_clean & (k_block.low < q_block.high))
        before = k_block.low <= q_block.high if self.whole_clean else k.low <= q.high
        some |= (q_last == self.views) & k_clean & before
        one = q_whole & k_whole
        block = (q_block.low == q_block.high) & (k_block.low == k_block.high) & (q_block.low == k_block.low)
        before = k_block.high <= q_block.low if self.whole_clean else k.high <= q.low
        every = one & jnp.where(k_clean, jnp.where(q_noised, k_block.high < q_block.low, before),
                                (q_first == k_first) & block)
        return (some, every), q, k
