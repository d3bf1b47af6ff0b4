"""The forward process: tokens are replaced by the mask token, and the batch remembers which."""

import dataclasses

import jax
import jax.numpy as jnp

from dlm_jax.diffusion.schedule import NoiseSchedule


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CorruptedBatch:
    """A noised batch with all that the loss needs, so that nothing is inferred from a token's value.

    Attributes:
      tokens: int32 [batch, length], what the network reads.
      targets: int32 [batch, length], the clean tokens.
      scored: bool [batch, length], the positions whose cross-entropy counts.
      maskable: bool [batch, length], the positions that could have been noised; their number normalises the bound.
      weights: float32 [batch, length], weight of each position's cross-entropy.
      positions: int32 [batch or 1, length], where in its text each token stands; None: counted from 0.
    """

    tokens: jax.Array
    targets: jax.Array
    scored: jax.Array
    maskable: jax.Array
    weights: jax.Array
    positions: jax.Array | None = None


def corrupt(tokens: jax.Array, maskable: jax.Array, times: jax.Array, keys: jax.Array, *, mask_token_id: int,
            schedule: NoiseSchedule = NoiseSchedule()) -> CorruptedBatch:
    """Masks each maskable token independently with the schedule's probability at its row's time.

    Args:
      tokens: int32 [batch, length].
      maskable: bool [batch, length]; position 0 should be False, as context is never noised.
      times: float32 [batch] or [batch, length], in (0, 1].
      keys: random keys [batch], one per example.

    Returns:
      A batch weighted by the bound's weight at each time (arXiv 2410.17891, eq. 4 for the linear schedule).
    """
    length = tokens.shape[1]
    noise = jax.vmap(lambda key: jax.random.uniform(key, (length,)))(keys)
    times = times[:, None] if times.ndim == 1 else times
    masked = maskable & (noise < schedule.mask_probability(times))
    weights = jnp.broadcast_to(schedule.weight(times), tokens.shape).astype(jnp.float32)
    return CorruptedBatch(tokens=jnp.where(masked, mask_token_id, tokens), targets=tokens, scored=masked,
                          maskable=maskable, weights=weights)


def uncorrupted(tokens: jax.Array, maskable: jax.Array) -> CorruptedBatch:
    """The autoregressive case of the same batch: nothing noised, every maskable token scored with weight 1."""
    return CorruptedBatch(tokens=tokens, targets=tokens, scored=maskable, maskable=maskable,
                          weights=jnp.ones(tokens.shape, jnp.float32))
