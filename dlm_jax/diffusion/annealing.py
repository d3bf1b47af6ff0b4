"""How far attention has been opened from causal to bidirectional."""

import jax
import jax.numpy as jnp


def anneal_ratio(step: jax.Array | int, anneal_steps: int) -> jax.Array:
    """min(1, (step + 1) / anneal_steps), float32; 0 steps means bidirectional from the start.

    As in the release of arXiv 2410.17891, the first step is already slightly open.
    """
    if anneal_steps == 0:
        return jnp.float32(1.0)
    return jnp.minimum(1.0, (jnp.asarray(step, jnp.float32) + 1.0) / anneal_steps)
