"""The soft cap of scores and logits: cap * tanh(x / cap), which is x near 0 and never exceeds the cap (Gemma 2,
arXiv 2408.00118, section 2)."""

import jax
import jax.numpy as jnp


def soft_cap(x: jax.Array, cap: float | None) -> jax.Array:
    """Returns `x` capped; None: as it is."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def soft_cap_gradient(gradient: jax.Array, capped: jax.Array, cap: float | None) -> jax.Array:
    """Returns the gradient by what was capped, given that by the result and the result.

    A score that a mask has set far below -cap counts as at it.
    """
    return gradient if cap is None else gradient * (1 - jnp.square(jnp.maximum(capped / cap, -1)))
