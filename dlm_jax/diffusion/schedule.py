"""Noise schedules of absorbing diffusion, the times at which a batch is noised, and the annealing of attention.

At time t in (0, 1] each token is still clean with probability alpha(t), and the bound integrates the masked tokens'
cross-entropy against the weight -alpha'(t) / (1 - alpha(t)) (MD4, arXiv 2406.04329, eq. 4).
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from dlm_jax.config_fields import check_choices, check_range
from dlm_jax.random import TIMES, purpose_key


@dataclasses.dataclass(frozen=True)
class NoiseSchedule:
    """alpha(t) = 1 - t (linear), 1 - sin(pi t / 2) (cosine) or 1 - t**power (polynomial).

    Raises:
      ConfigError: the name is unknown, or the power is not positive.
    """

    name: Literal["linear", "cosine", "polynomial"] = "linear"
    power: float = 2.0

    def __post_init__(self) -> None:
        check_choices(self, "schedule")
        check_range(self.power, 0, math.inf, "schedule.power", open_low=True)

    def mask_probability(self, t: jax.Array) -> jax.Array:
        """Returns 1 - alpha(t), the probability that a token is masked at time t."""
        match self.name:
            case "linear":
                return t
            case "cosine":
                return jnp.sin(0.5 * math.pi * t)
            case _:
                return t**self.power

    def weight(self, t: jax.Array) -> jax.Array:
        """Returns -alpha'(t) / (1 - alpha(t)), the weight of a masked token's cross-entropy in the bound."""
        match self.name:
            case "linear":
                return 1.0 / t
            case "cosine":
                return 0.5 * math.pi / jnp.tan(0.5 * math.pi * t)
            case _:
                return self.power / t


def sample_times(seed: jax.Array | int, step: jax.Array | int, example_index: jax.Array, batch_size: int, *,
                 low: jax.Array | float = 1e-3, high: jax.Array | float = 1.0) -> jax.Array:
    """Samples times float32 [batch] in [low, high], spread over the global batch and balanced within pairs of rows.

    Rows 2j and 2j + 1 of the global batch take the fractions s and 1 - s of the range, where s is the j-th point of van
    der Corput's sequence, shifted by one uniform offset per step. Each time alone is uniform. Together they cover the
    range (the low variance of Kingma et al., arXiv 2107.00630, appendix I.1), and so does any aligned run of rows.
    Under the linear schedule a pair masks half its tokens on average, so that devices which hold full pairs, as they do
    with contiguous rows in even numbers, have equal work for the head; with one row per device they do not.

    Args:
      example_index: [batch] global indices; the batch may be any slice of the global one.
      batch_size: size of the global batch, accumulation included.
    """
    offset = jax.random.uniform(jax.random.fold_in(purpose_key(seed, TIMES), step))
    row = example_index % batch_size
    fraction = (radical_inverse(row // 2) + offset) % 1.0
    return low + (high - low) * jnp.where(row % 2 == 0, fraction, 1.0 - fraction)


def block_times(times: jax.Array, block_size: int, length: int, *, low: jax.Array | float,
                high: jax.Array | float) -> jax.Array:
    """Returns a time per block, given one per row: [batch] in [low, high] to [batch, length], constant in each block.

    The first block has the row's time. Successive blocks advance by the golden ratio of the range (Weyl's sequence), so
    that the blocks of a row cover the range evenly, and each is uniform where the row's own time is.
    """
    block = jnp.arange(length) // block_size
    steps = np.arange(-(-length // block_size)) * ((5**0.5 - 1) / 2) % 1.0  # in float64: there may be many blocks
    fraction = ((times - low) / (high - low))[:, None] + jnp.asarray(steps, jnp.float32)[block]
    return jnp.where(block == 0, times[:, None], low + (high - low) * (fraction % 1.0))


def radical_inverse(index: jax.Array) -> jax.Array:
    """Returns van der Corput's sequence, float32 in [0, 1): the binary digits of `index` mirrored at the point."""
    digit = jnp.arange(24, dtype=jnp.uint32)  # as many as float32 holds exactly
    digits = (index[..., None].astype(jnp.uint32) >> digit) & 1
    return jnp.sum(digits * 0.5 ** (digit + 1.0), axis=-1, dtype=jnp.float32)


def anneal_ratio(step: jax.Array | int, anneal_steps: int) -> jax.Array:
    """Returns the share of later positions open to attention: min(1, (step + 1) / anneal_steps), float32.

    0 steps means bidirectional from the start. As in the DiffuLLaMA reference implementation (arXiv 2410.17891), the
    first step is already slightly open.
    """
    if anneal_steps == 0:
        return jnp.float32(1.0)
    return jnp.minimum(1.0, (jnp.asarray(step, jnp.float32) + 1.0) / anneal_steps)
