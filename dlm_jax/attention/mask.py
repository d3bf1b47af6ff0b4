"""Which query sees which key: a description that every backend evaluates, never a stored [length, length] square.

`AttentionMask` is what the library builds and passes on. Its rule, `MaskSpec.allowed`, is a pure function of positions:
the same on the full square and on one tile of it. `MaskSpec.tile_coverage` bounds the rule over a tile, so that a
kernel skips a tile that allows nothing and needs no mask in one that allows everything.
"""

import dataclasses
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp

from dlm_jax.config_fields import check_at_least
from dlm_jax.errors import ConfigError
from dlm_jax.random import RESOLUTION, below, counter_hash, threshold

MAX_BRANCHES = 1 << 10  # of a segment, its start included; ids of segments are multiples of it


class MaskParams(NamedTuple):
    """The numbers of a rule that differ per example: scalars in a kernel, anything that broadcasts elsewhere."""

    threshold: jax.Array  # int32: annealing opens a later key with probability threshold / 2**24
    pattern: jax.Array  # uint32: the hash of (seed, example) that annealing continues
    length: jax.Array  # int32: keys from here on are padding
    causal_before: jax.Array  # int32: under "block_causal", queries before it are causal; see `MaskSpec` for "drafts"


class Span(NamedTuple):
    """The smallest and the largest position, or segment, in a tile."""

    low: jax.Array
    high: jax.Array


@dataclasses.dataclass(frozen=True)
class MaskSpec:
    """The static fields of a mask, known when a program is compiled, and its rule.

    "block_diffusion" covers `views` noisy copies of a text followed by a clean one, each of `text_length` positions.
    The clean copy is causal, or bidirectional within each block with `bidirectional_clean`; a noised block is
    bidirectional, or with `causal_blocks` causal.

    "drafts" covers a text of `text_length` positions, which is causal, and after it groups of `block_size` positions.
    The positions of a group see each other, with `causal_blocks` no later one, and the text that the group continues:
    `causal_before` tokens of it for the first group, and one more for each group after that.

    "anchored" covers a text of `text_length` positions, which asks nothing, and after it blocks of `block_size`
    positions. A block sees itself and the text before its anchor, the place where it begins in the text; with
    `causal_blocks` its queries see nothing later. The window is measured in the text.

    With `branches`, a segment is a start, whose id is a multiple of `MAX_BRANCHES`, and texts that continue it, which
    have the ids after that one; each sees itself and the start.
    """

    kind: str
    block_size: int = 0
    window: int | None = None
    segments: bool = False
    branches: bool = False
    lengths: bool = False
    text_length: int = 0
    views: int = 0
    bidirectional_clean: bool = False
    causal_blocks: bool = False

    def allowed(self, q: jax.Array, k: jax.Array, params: MaskParams, query_segments: jax.Array | None = None,
                key_segments: jax.Array | None = None, query_anchors: jax.Array | None = None) -> jax.Array:
        """Returns whether a query sees a key, bool; the arguments broadcast against each other."""
        index = k  # in all copies
        match self.kind:
            case "causal":
                allowed = k <= q
            case "bidirectional" | "matrix":  # `AttentionMask.allowed` applies the matrix
                allowed = jnp.ones(jnp.broadcast_shapes(q.shape, k.shape), bool)
            case "annealed":
                allowed = (k <= q) | below(counter_hash(q, k, state=params.pattern), params.threshold)
            case "block_causal":
                allowed = k <= self._block_end(q, params)
            case "block_diffusion":
                (q_copy, q), (k_copy, k) = self._split(q), self._split(k)
                q_block, k_block = q // self.block_size, k // self.block_size
                q_clean, k_clean = q_copy == self.views, k_copy == self.views
                # Masks are combined with & and |, never == or where: Mosaic cannot lower those on bool tiles. So blocks
                # are numbered through all copies.
                count = -(-self.text_length // self.block_size)
                own = (q_copy * count + q_block == k_copy * count + k_block) & ~k_clean
                allowed = self._within_block(own, q, k)
                before = k_block <= q_block if self.bidirectional_clean else k <= q
                allowed |= k_clean & ((~q_clean & (k_block < q_block)) | (q_clean & before))
            case "drafts":
                q_group, k_group = ((x - self.text_length) // self.block_size for x in (q, k))
                q_text, k_text = q < self.text_length, k < self.text_length
                continued = k < params.causal_before + q_group
                own = self._within_block(k_group == q_group, q, k)
                allowed = (q_text & (k <= q)) | (~q_text & ((k_text & continued) | (~k_text & own)))
            case "anchored":
                k_text = k < self.text_length
                own = self._within_block(self.anchored_block(k) == self.anchored_block(q), q, k)
                allowed = (q >= self.text_length) & ((k_text & (k < query_anchors)) | (~k_text & own))
                q = query_anchors + (q - self.text_length) % self.block_size
                k = jnp.where(k_text, k, query_anchors + (k - self.text_length) % self.block_size)
            case _:
                raise ValueError(f"unknown attention mask kind {self.kind!r}")
        if self.window is not None:
            allowed &= jnp.abs(q - k) < self.window
        if self.segments:
            same = query_segments == key_segments
            allowed &= same | (_start_of(query_segments) == key_segments) if self.branches else same
        if self.lengths:
            allowed &= index < params.length
        return allowed

    def tile_coverage(self, q: Span, k: Span, params: MaskParams, query_segments: Span | None = None,
                      key_segments: Span | None = None) -> tuple[jax.Array, jax.Array]:
        """Bounds the rule over a tile by its corners.

        Returns:
          two scalar bools: whether the tile may allow a pair, and whether it certainly allows every pair.
        """
        index = k  # in all copies
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
            case "block_diffusion":
                some, every, q, k = self._copies_coverage(q, k)
            case _:
                raise ValueError(f"attention mask kind {self.kind!r} has no tiles")
        if self.window is not None:
            some &= (k.low - q.high < self.window) & (q.low - k.high < self.window)
            every &= (k.high - q.low < self.window) & (q.high - k.low < self.window)
        if self.segments:
            q, k = query_segments, key_segments
            meet, equal = (q.low <= k.high) & (k.low <= q.high), (q.low == k.high) & (q.high == k.low)
            if self.branches:
                first, last = _start_of(q.low), _start_of(q.high)
                meet |= (first <= k.high) & (k.low <= last)
                equal |= (first == k.high) & (last == k.low)
            some &= meet
            every &= equal
        if self.lengths:
            some &= index.low < params.length
            every &= index.high < params.length
        return some, every

    def _within_block(self, same: jax.Array, q: jax.Array, k: jax.Array) -> jax.Array:
        """Returns whether a query sees a key where both are in the `same` noised block."""
        return same & (k <= q) if self.causal_blocks else same

    def _block_end(self, q: jax.Array, params: MaskParams) -> jax.Array:
        """Returns the last key that a "block_causal" query sees; it never decreases as `q` grows."""
        return jnp.where(q < params.causal_before, q, q // self.block_size * self.block_size + self.block_size - 1)

    def anchored_block(self, x: jax.Array) -> jax.Array:
        """Returns the number of the block that an "anchored" position is in; in the text it is negative."""
        return (x - self.text_length) // self.block_size

    def _split(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Splits positions in all copies into the copy and the position in its text."""
        copy = sum((x >= number * self.text_length).astype(jnp.int32) for number in range(1, self.views + 1))
        return copy, x - copy * self.text_length

    def _copies_coverage(self, q: Span, k: Span) -> tuple[jax.Array, jax.Array, Span, Span]:
        """Returns `tile_coverage` of "block_diffusion" and the spans within the text."""
        (q_first, q_low), (q_last, q_high) = self._split(q.low), self._split(q.high)
        (k_first, k_low), (k_last, k_high) = self._split(k.low), self._split(k.high)
        # A tile that spans several copies is taken to cover the full text.
        q_single, k_single, end = q_first == q_last, k_first == k_last, self.text_length - 1
        q = Span(jnp.where(q_single, q_low, 0), jnp.where(q_single, q_high, end))
        k = Span(jnp.where(k_single, k_low, 0), jnp.where(k_single, k_high, end))
        q_block, k_block = (Span(x.low // self.block_size, x.high // self.block_size) for x in (q, k))
        same_copy = (q_first <= k_last) & (k_first <= q_last)
        q_noised, k_clean = q_first < self.views, k_last == self.views
        meet = (k_block.low <= q_block.high) & (q_block.low <= k_block.high)
        one_block = (q_block.low == q_block.high) & (k_block.low == k_block.high) & (q_block.low == k_block.low)
        if self.causal_blocks:
            meet, one_block = meet & (k.low <= q.high), one_block & (k.high <= q.low)
        some = (same_copy & q_noised & (k_first < self.views) & meet) | (
            q_noised & k_clean & (k_block.low < q_block.high))
        before = k_block.low <= q_block.high if self.bidirectional_clean else k.low <= q.high
        some |= (q_last == self.views) & k_clean & before
        before = k_block.high <= q_block.low if self.bidirectional_clean else k.high <= q.low
        every = q_single & k_single & jnp.where(k_clean, jnp.where(q_noised, k_block.high < q_block.low, before),
                                                (q_first == k_first) & one_block)
        return some, every, q, k


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionMask:
    """A rule on (query position, key position), narrowed by segments, lengths and a window.

    Build one with the class methods. Positions are array indices, not the rotary positions of packed rows. With several
    copies of a text, segment ids cover all copies and the window applies within the text.
    """

    spec: MaskSpec = dataclasses.field(metadata={"static": True})
    ratio: jax.Array | None = None
    seed: jax.Array | None = None
    example_index: jax.Array | None = None  # uint32 [batch]
    allowed_matrix: jax.Array | None = None  # bool [length, length]
    segment_ids: jax.Array | None = None  # int32 [batch, length of all copies]
    lengths: jax.Array | None = None  # int32 [batch]
    causal_before: jax.Array | None = None  # int32 [batch]
    anchors: jax.Array | None = None  # int32 [batch, blocks]

    @classmethod
    def causal(cls) -> Self:
        """Returns a mask under which a query sees itself and earlier positions."""
        return cls(MaskSpec("causal"))

    @classmethod
    def bidirectional(cls) -> Self:
        """Returns a mask under which a query sees every position."""
        return cls(MaskSpec("bidirectional"))

    @classmethod
    def annealed(cls, ratio: jax.Array | float, seed: jax.Array | int,
                 example_index: jax.Array | None = None) -> Self:
        """Returns a causal mask that opens each later key with probability `ratio` (arXiv 2410.17891, section 3.2).

        Args:
          ratio: 0 is causal and 1 is bidirectional, both exactly.
          seed: uint32, a new one per step. All layers get the same mask and share its pattern within a step, as in the
            DiffuLLaMA reference implementation.
          example_index: uint32 [batch], one pattern per example; None shares one pattern across the batch.
        """
        return cls(MaskSpec("annealed"), ratio=jnp.asarray(ratio, jnp.float32), seed=jnp.asarray(seed, jnp.uint32),
                   example_index=None if example_index is None else jnp.asarray(example_index, jnp.uint32))

    @classmethod
    def block_causal(cls, block_size: int, causal_before: jax.Array | None = None) -> Self:
        """Returns a mask under which a query sees its own block of `block_size` positions and every earlier one.

        Args:
          causal_before: int [batch]; queries before it are causal, as the clean text of block diffusion is.
        """
        check_at_least(block_size, 1, "block_size")
        return cls(MaskSpec("block_causal", block_size),
                   causal_before=None if causal_before is None else jnp.asarray(causal_before, jnp.int32))

    @classmethod
    def block_diffusion(cls, block_size: int, text_length: int, views: int = 1, *,
                        bidirectional_clean: bool = False, causal_blocks: bool = False) -> Self:
        """Returns the mask of `views` noisy copies of a text followed by a clean one, `text_length` positions each.

        A noised block of `block_size` positions sees itself and the clean copy of every earlier block (block diffusion,
        arXiv 2503.09573). The clean copy is causal like the AR parent (NBDiff, arXiv 2512.06776), or with
        `bidirectional_clean` also bidirectional within each block (block diffusion's own). With `causal_blocks` a
        noised token sees no later one of its block. Blocks are counted from the start of the text; the last one may be
        shorter.
        """
        check_at_least(block_size, 1, "block_size")
        return cls(MaskSpec("block_diffusion", block_size, text_length=text_length, views=views,
                            bidirectional_clean=bidirectional_clean, causal_blocks=causal_blocks))

    @classmethod
    def drafts(cls, text_length: int, group_size: int, start: jax.Array, *, causal: bool = False) -> Self:
        """Returns the mask of a causal text of `text_length` positions, and of groups of drafts after it.

        Group j sees itself and the first `start` + j positions of the text, which it continues; nothing sees a group
        but the group itself.

        Args:
          start: int [batch].
          causal: within its group a query sees no later position.
        """
        check_at_least(group_size, 1, "group_size")
        return cls(MaskSpec("drafts", group_size, text_length=text_length, causal_blocks=causal),
                   causal_before=jnp.asarray(start, jnp.int32))

    @classmethod
    def anchored(cls, text_length: int, block_size: int, anchors: jax.Array, *, causal: bool = False) -> Self:
        """Returns the mask of blocks that continue a text at different places (DFlash, arXiv 2602.06036).

        Keys are a text of `text_length` positions and one block for each anchor after it; queries are the blocks. A
        block sees the text before its anchor, and itself.

        Args:
          anchors: int [batch, blocks], the positions in the text at which the blocks begin.
          causal: within its block a query sees no later position.
        """
        check_at_least(block_size, 1, "block_size")
        return cls(MaskSpec("anchored", block_size, text_length=text_length, causal_blocks=causal),
                   anchors=jnp.asarray(anchors, jnp.int32))

    @classmethod
    def matrix(cls, allowed: jax.Array) -> Self:
        """Returns a mask from a bool matrix [length, length]: query i sees key j where allowed[i, j]."""
        return cls(MaskSpec("matrix"), allowed_matrix=jnp.asarray(allowed, bool))

    def with_segments(self, segment_ids: jax.Array) -> Self:
        """Also forbids keys of another segment; `segment_ids` int [batch, length], of one copy of the text."""
        segment_ids = jnp.asarray(segment_ids, jnp.int32)
        if self.anchors is not None:  # a block is in the segment of its anchor
            of_blocks = jnp.take_along_axis(segment_ids, self.anchors, axis=1)
            segment_ids = jnp.concatenate([segment_ids, jnp.repeat(of_blocks, self.spec.block_size, axis=1)], axis=1)
        segment_ids = jnp.tile(segment_ids, self.spec.views + 1)
        spec = dataclasses.replace(self.spec, segments=True)
        return dataclasses.replace(self, spec=spec, segment_ids=segment_ids)

    def with_branches(self, segment_ids: jax.Array, branch_ids: jax.Array) -> Self:
        """Also forbids keys of another segment, and of another branch of it, so that a segment holds several texts.

        Args:
          segment_ids: int [batch, length].
          branch_ids: int [batch, length], below `MAX_BRANCHES`: 0 in what all texts of the segment begin with, else the
            text's number.

        Raises:
          ConfigError: the mask covers several copies of a text, or blocks.
        """
        if self.spec.kind in ("block_diffusion", "anchored", "drafts"):
            raise ConfigError(f"a {self.spec.kind} mask takes no branches; give each text a row of its own")
        ids = jnp.asarray(segment_ids, jnp.int32) * MAX_BRANCHES + jnp.asarray(branch_ids, jnp.int32)
        return dataclasses.replace(self, spec=dataclasses.replace(self.spec, segments=True, branches=True),
                                   segment_ids=ids)

    def with_lengths(self, lengths: jax.Array) -> Self:
        """Also forbids keys at or past `lengths` int [batch], which are padding.

        Raises:
          ConfigError: the mask covers several copies of a text; give padding its own segment there.
        """
        if self.spec.kind == "block_diffusion":
            raise ConfigError("a block_diffusion mask takes no lengths; give padding a segment of its own instead")
        spec = dataclasses.replace(self.spec, lengths=True)
        return dataclasses.replace(self, spec=spec, lengths=jnp.asarray(lengths, jnp.int32))

    def with_window(self, window: int | None) -> Self:
        """Also forbids keys `window` or more positions away, on either side (Mistral's, made symmetric)."""
        return dataclasses.replace(self, spec=dataclasses.replace(self.spec, window=window))

    def params(self) -> MaskParams:
        """Returns the numbers of the rule per example, each int32 or uint32 [batch or 1]."""
        annealed = self.spec.kind == "annealed"
        example = 0 if self.example_index is None else self.example_index
        return MaskParams(
            threshold=jnp.atleast_1d(jnp.asarray(threshold(self.ratio) if annealed else 0, jnp.int32)),
            pattern=jnp.atleast_1d(counter_hash(self.seed, example) if annealed else jnp.uint32(0)),
            length=jnp.full(1, jnp.iinfo(jnp.int32).max) if self.lengths is None else self.lengths,
            causal_before=jnp.zeros(1, jnp.int32) if self.causal_before is None else self.causal_before)

    def count_visible_keys(self, query_positions: jax.Array, num_keys: int) -> jax.Array:
        """Returns a number, int32, such that no query sees a key from there on; `num_keys` where the rule gives none.

        Args:
          query_positions: int [Q] or [batch, Q]; those that are no positions of keys do not count.
        """
        if self.spec.kind == "causal":
            last = query_positions
        elif self.spec.kind == "block_causal":
            last = self.spec._block_end(jnp.atleast_2d(query_positions),
                                        MaskParams(*(x[:, None] for x in self.params())))
        else:
            return jnp.int32(num_keys)
        last = jnp.where((query_positions >= 0) & (query_positions < num_keys), last, 0)
        return jnp.minimum(last.max() + 1, num_keys)

    def allowed(self, query_positions: jax.Array, key_positions: jax.Array) -> jax.Array:
        """Evaluates the rule: positions int [Q] or [batch, Q] and [K] give bool [batch or 1, Q, K]."""
        query_positions = jnp.atleast_2d(query_positions)
        q, k = query_positions[:, :, None], key_positions[None, None, :]
        query_segments = key_segments = None
        if self.segment_ids is not None:
            index = jnp.broadcast_to(query_positions, (len(self.segment_ids), q.shape[1]))
            query_segments = jnp.take_along_axis(self.segment_ids, index, axis=1)[:, :, None]
            key_segments = jnp.take(self.segment_ids, key_positions, axis=1)[:, None, :]
        query_anchors = None
        if self.anchors is not None:
            block = jnp.clip(self.spec.anchored_block(query_positions), 0, self.anchors.shape[1] - 1)
            block = jnp.broadcast_to(block, (len(self.anchors), q.shape[1]))
            query_anchors = jnp.take_along_axis(self.anchors, block, axis=1)[:, :, None]
        params = MaskParams(*(x[:, None, None] for x in self.params()))
        allowed = self.spec.allowed(q, k, params, query_segments, key_segments, query_anchors)
        return allowed if self.allowed_matrix is None else allowed & self.allowed_matrix[q, k]


def _start_of(segments: jax.Array) -> jax.Array:
    """Returns the ids of the starts of segments with branches."""
    return segments & -MAX_BRANCHES
