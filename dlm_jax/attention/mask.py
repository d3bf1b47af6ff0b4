"""The rule behind a mask as a pure function of positions: the same on the whole square and on one tile of it."""

import dataclasses
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp

from dlm_jax.errors import ConfigError
from dlm_jax.random import RESOLUTION, below, counter_hash, threshold


class MaskParams(NamedTuple):
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
class MaskSpec:
    """The part of an `AttentionMask` that is known when a program is compiled.

    Of the kind `block_diffusion`, which is of several copies of a text one after another, `text_length` is that of one
    copy and `views` how many are noised; a clean one follows them, causal or with `bidirectional_clean` in whole blocks.
    """

    kind: str
    block_size: int = 0
    window: int | None = None
    segments: bool = False
    lengths: bool = False
    text_length: int = 0
    views: int = 0
    bidirectional_clean: bool = False

    def split(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Of indices of several copies: which copy each lies in, and where in its text."""
        copy = sum((x >= number * self.text_length).astype(jnp.int32) for number in range(1, self.views + 1))
        return copy, x - copy * self.text_length

    def allowed(self, q: jax.Array, k: jax.Array, params: MaskParams, query_segments: jax.Array | None = None,
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
                allowed = (k <= q) | below(counter_hash(q, k, state=params.pattern), params.threshold)
            case "block_causal":
                allowed = k <= self._block_end(q, params)
            case "block_diffusion":
                q_block, k_block = q // self.block_size, k // self.block_size
                q_clean, k_clean = q_copy == self.views, k_copy == self.views
                # A noised block sees itself whole and what is clean before it.
                # (Blocks are numbered through the copies and truths are joined, neither compared nor chosen between:
                # the TPU's compiler refuses that of whole tiles.)
                count = -(-self.text_length // self.block_size)
                allowed = (q_copy * count + q_block == k_copy * count + k_block) & ~k_clean
                before = k_block <= q_block if self.bidirectional_clean else k <= q
                allowed |= k_clean & ((~q_clean & (k_block < q_block)) | (q_clean & before))
            case _:
                raise ValueError(f"unknown attention mask kind {self.kind!r}")
        if self.window is not None:
            allowed &= jnp.abs(q - k) < self.window
        if self.segments:
            allowed &= query_segments == key_segments
        if self.lengths:
            allowed &= k < params.length
        return allowed

    def tile_coverage(self, q: Span, k: Span, params: MaskParams, query_segments: Span | None = None,
               key_segments: Span | None = None) -> tuple[jax.Array, jax.Array]:
        """What the corners of a tile tell of it: (it may allow something, it allows everything), scalar bools."""
        if self.kind == "block_diffusion":
            (some, every), q, k = self._copies_coverage(q, k)
            return self._narrowed(some, every, q, k, params, query_segments, key_segments)
        match self.kind:
            case "causal":
                some, every = k.low <= q.high, k.high <= q.low
            case "bidirectional":
                some = every = jnp.bool_(True)
            case "annealed":
                some = (k.low <= q.high) | (params.threshold > 0)
                every = (k.high <= q.low) | (params.threshold == RESOLUTION)
            case "block_causal":
                some, every = k.low <= self._block_end(q.high, params), k.high <= self._block_end(q.low, params)
            case _:
                raise ValueError(f"attention mask kind {self.kind!r} has no tiles")
        return self._narrowed(some, every, q, k, params, query_segments, key_segments)

    def _block_end(self, q: jax.Array, params: MaskParams) -> jax.Array:
        """The last key that a query of the kind `block_causal` sees; it never falls as `q` grows."""
        return jnp.where(q < params.causal_before, q, q // self.block_size * self.block_size + self.block_size - 1)

    def _narrowed(self, some: jax.Array, every: jax.Array, q: Span, k: Span, params: MaskParams,
                  query_segments: Span | None, key_segments: Span | None) -> tuple[jax.Array, jax.Array]:
        """`tile_coverage` after what narrows every kind."""
        if self.window is not None:
            some &= (k.low - q.high < self.window) & (q.low - k.high < self.window)
            every &= (k.high - q.low < self.window) & (q.high - k.low < self.window)
        if self.segments:
            some &= (query_segments.low <= key_segments.high) & (key_segments.low <= query_segments.high)
            every &= (query_segments.low == key_segments.high) & (key_segments.low == query_segments.high)
        if self.lengths:
            some &= k.low < params.length
            every &= k.high < params.length
        return some, every

    def _copies_coverage(self, q: Span, k: Span) -> tuple[tuple[jax.Array, jax.Array], Span, Span]:
        """`tile_coverage` of the kind `block_diffusion`, and the spans in the text; a tile may lie across several copies."""
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
        before = k_block.low <= q_block.high if self.bidirectional_clean else k.low <= q.high
        some |= (q_last == self.views) & k_clean & before
        one = q_whole & k_whole
        block = (q_block.low == q_block.high) & (k_block.low == k_block.high) & (q_block.low == k_block.low)
        before = k_block.high <= q_block.low if self.bidirectional_clean else k.high <= q.low
        every = one & jnp.where(k_clean, jnp.where(q_noised, k_block.high < q_block.low, before),
                                (q_first == k_first) & block)
        return (some, every), q, k


# ---- Which query may see which key: a description that every attention backend evaluates, never a stored square.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionMask:
    """A rule on (query position, key position), narrowed by segments, lengths and a window.

    Build one with the class methods. Positions are array indices, not the rotary positions of packed rows; with several
    copies of a text, segments are those of all copies and the window is one within the text.
    """

    kind: str = dataclasses.field(metadata={"static": True})
    block_size: int = dataclasses.field(default=0, metadata={"static": True})
    window: int | None = dataclasses.field(default=None, metadata={"static": True})
    text_length: int = dataclasses.field(default=0, metadata={"static": True})
    views: int = dataclasses.field(default=0, metadata={"static": True})
    bidirectional_clean: bool = dataclasses.field(default=False, metadata={"static": True})
    ratio: jax.Array | None = None
    seed: jax.Array | None = None
    example_index: jax.Array | None = None  # uint32 [batch]
    allowed_matrix: jax.Array | None = None  # bool [length, length]
    segment_ids: jax.Array | None = None  # int32 [batch, length], of all copies
    lengths: jax.Array | None = None  # int32 [batch]
    causal_before: jax.Array | None = None  # int32 [batch]

    @classmethod
    def causal(cls) -> Self:
        """A query sees itself and what precedes it."""
        return cls(kind="causal")

    @classmethod
    def bidirectional(cls) -> Self:
        """A query sees every position."""
        return cls(kind="bidirectional")

    @classmethod
    def annealed(cls, ratio: jax.Array | float, seed: jax.Array | int,
                 example_index: jax.Array | None = None) -> Self:
        """Causal, and each later key opened with probability `ratio` (arXiv 2410.17891, section 3.2).

        Args:
          ratio: 0 is causal and 1 is bidirectional, both exactly.
          seed: uint32; give another one each step. The layers of a network are given one mask, and so share its
            pattern within a step, as in the release.
          example_index: uint32 [batch], a pattern for each example; None shares one pattern across the batch.
        """
        return cls(kind="annealed", ratio=jnp.asarray(ratio, jnp.float32), seed=jnp.asarray(seed, jnp.uint32),
                   example_index=None if example_index is None else jnp.asarray(example_index, jnp.uint32))

    @classmethod
    def block_causal(cls, block_size: int, causal_before: jax.Array | None = None) -> Self:
        """A query sees its own block of `block_size` positions whole, and every earlier block.

        `causal_before` int [batch]: queries before it see causally, as the clean text of block diffusion does.
        """
        if block_size < 1:
            raise ConfigError(f"block_size must be at least 1, got {block_size}")
        return cls(kind="block_causal", block_size=block_size,
                   causal_before=None if causal_before is None else jnp.asarray(causal_before, jnp.int32))

    @classmethod
    def block_diffusion(cls, block_size: int, text_length: int, views: int = 1, *, bidirectional_clean: bool = False) -> Self:
        """Of `views` noised copies of a text and a clean one behind them, each of `text_length` positions.

        A noised block of `block_size` positions sees itself whole and the clean copy of every earlier block (block
        diffusion, arXiv 2503.09573). The clean copy sees itself as the AR parent would, causally (NBDiff's, arXiv
        2512.06776), or with `bidirectional_clean` also each block whole (block diffusion's own). Blocks are counted from the
        beginning of the text; the last may be shorter.
        """
        if block_size < 1:
            raise ConfigError(f"block_size must be at least 1, got {block_size}")
        return cls(kind="block_diffusion", block_size=block_size, text_length=text_length, views=views,
                   bidirectional_clean=bidirectional_clean)

    @classmethod
    def matrix(cls, allowed: jax.Array) -> Self:
        """`allowed` [length, length] bool: query i sees key j where allowed[i, j]. For tests and experiments."""
        return cls(kind="matrix", allowed_matrix=jnp.asarray(allowed, bool))

    def with_segments(self, segment_ids: jax.Array) -> Self:
        """Also forbids seeing another segment; `segment_ids` int [batch, length], of one text if it is of copies."""
        segment_ids = jnp.tile(jnp.asarray(segment_ids, jnp.int32), self.views + 1)
        return dataclasses.replace(self, segment_ids=segment_ids)

    def with_lengths(self, lengths: jax.Array) -> Self:
        """Also forbids keys at or past `lengths` int [batch], which are padding.

        Raises:
          ConfigError: of several copies of a text; give their padding a segment of its own.
        """
        if self.kind == "block_diffusion":
            raise ConfigError("a block_diffusion mask takes no lengths; give padding a segment of its own instead")
        return dataclasses.replace(self, lengths=jnp.asarray(lengths, jnp.int32))

    def with_window(self, window: int | None) -> Self:
        """Also forbids keys `window` or more positions away, on either side (Mistral's, made symmetric)."""
        return dataclasses.replace(self, window=window)

    @property
    def spec(self) -> MaskSpec:
        """What of this mask is known when a program is compiled."""
        return MaskSpec(self.kind, self.block_size, self.window, self.segment_ids is not None, self.lengths is not None,
                    self.text_length, self.views, self.bidirectional_clean)

    def params(self) -> MaskParams:
        """What the rule needs to know of each example, each int32 or uint32 [batch or 1]."""
        annealed = self.kind == "annealed"
        example = 0 if self.example_index is None else self.example_index
        return MaskParams(
            threshold=jnp.atleast_1d(jnp.asarray(threshold(self.ratio) if annealed else 0, jnp.int32)),
            pattern=jnp.atleast_1d(counter_hash(self.seed, example) if annealed else jnp.uint32(0)),
            length=jnp.full(1, jnp.iinfo(jnp.int32).max) if self.lengths is None else self.lengths,
            causal_before=jnp.zeros(1, jnp.int32) if self.causal_before is None else self.causal_before)

    def allowed(self, query_positions: jax.Array, key_positions: jax.Array) -> jax.Array:
        """Evaluates the rule: positions int [Q] or [batch, Q] and [K] give bool [batch or 1, Q, K]."""
        query_positions = jnp.atleast_2d(query_positions)
        q, k = query_positions[:, :, None], key_positions[None, None, :]
        query_segments = key_segments = None
        if self.segment_ids is not None:
            at = jnp.broadcast_to(query_positions, (len(self.segment_ids), q.shape[1]))
            query_segments = jnp.take_along_axis(self.segment_ids, at, axis=1)[:, :, None]
            key_segments = jnp.take(self.segment_ids, key_positions, axis=1)[:, None, :]
        params = MaskParams(*(x[:, None, None] for x in self.params()))
        allowed = self.spec.allowed(q, k, params, query_segments, key_segments)
        return allowed if self.allowed_matrix is None else allowed & self.allowed_matrix[q, k]
