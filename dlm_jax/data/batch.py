"""What a training step receives."""

import dataclasses

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows of tokens with what each step needs to know about them.

    Attributes:
      tokens: int32 [batch, length].
      maskable: bool [batch, length]; True where a token may be noised and scored. Position 0 is never True.
      example_index: uint32 [batch], `step * batch_size + row` over the global batch; all noise derives from it.
      segment_ids: int32 [batch, length] or None; tokens attend only within their segment.
      positions: int32 [batch, length] or None for 0, 1, 2, ...; they restart with each segment.
    """

    tokens: jax.Array
    maskable: jax.Array
    example_index: jax.Array
    segment_ids: jax.Array | None = None
    positions: jax.Array | None = None
