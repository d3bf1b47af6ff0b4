"""Every random number is a function of (seed, purpose, step or global example index) and of nothing else."""

import jax

from dlm_jax.attention.hashing import counter_hash

TIMES, CORRUPTION, DROPOUT, ANNEALING = range(4)  # purposes


def stream(seed: jax.Array | int, purpose: int) -> jax.Array:
    """The key from which all numbers of one purpose are folded."""
    return jax.random.fold_in(jax.random.key(seed), purpose)


def example_keys(seed: jax.Array | int, example_index: jax.Array) -> jax.Array:
    """A key for the corruption of each example: `example_index` [batch] to keys [batch]."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(stream(seed, CORRUPTION), example_index)


def dropout_seeds(seed: jax.Array | int, example_index: jax.Array) -> jax.Array:
    """The uint32 seeds [batch] from which each example's dropout is hashed."""
    return counter_hash(seed, DROPOUT, example_index)


def annealing_seed(seed: jax.Array | int, step: jax.Array | int) -> jax.Array:
    """The uint32 seed of one step's annealed attention mask."""
    return counter_hash(seed, ANNEALING, step)
