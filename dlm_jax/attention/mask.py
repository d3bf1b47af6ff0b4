"""Which query may see which key: a description that every attention backend evaluates, never a stored square."""

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp

from dlm_jax.attention.hashing import counter_hash, threshold
from dlm_jax.attention.rule import Numbers, Rule
from dlm_jax.errors import ConfigError


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
    whole_clean: bool = dataclasses.field(default=False, metadata={"static": True})
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
    def block_diffusion(cls, block_size: int, text_length: int, views: int = 1, *, whole_clean: bool = False) -> Self:
        """Of `views` noised copies of a text and a clean one behind them, each of `text_length` positions.

        A noised block of `block_size` positions sees itself whole and the clean copy of every earlier block (block
        diffusion, arXiv 2503.09573). The clean copy sees itself as the AR parent would, causally (NBDiff's, arXiv
        2512.06776), or with `whole_clean` also each block whole (block diffusion's own). Blocks are counted from the
        beginning of the text; the last may be shorter.
        """
        if block_size < 1:
            raise ConfigError(f"block_size must be at least 1, got {block_size}")
        return cls(kind="block_diffusion", block_size=block_size, text_length=text_length, views=views,
                   whole_clean=whole_clean)

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
    def rule(self) -> Rule:
        """What of this mask is known when a program is compiled."""
        return Rule(self.kind, self.block_size, self.window, self.segment_ids is not None, self.lengths is not None,
                    self.text_length, self.views, self.whole_clean)

    def numbers(self) -> Numbers:
        """What the rule needs to know of each example, each int32 or uint32 [batch or 1]."""
        annealed = self.kind == "annealed"
        example = 0 if self.example_index is None else self.example_index
        return Numbers(
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
        numbers = Numbers(*(x[:, None, None] for x in self.numbers()))
        allowed = self.rule.allowed(q, k, numbers, query_segments, key_segments)
        return allowed if self.allowed_matrix is None else allowed & self.allowed_matrix[q, k]
