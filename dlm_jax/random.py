"""Counter-based randomness: every random number is a function of (seed, purpose, step or global example index).

The same numbers come out on every device, mesh and backend. Randomness inside attention (annealing, dropout) must be
computable for any tile of the [length, length] square without the rest of it, so it is a hash of coordinates.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

TIMES, CORRUPTION, DROPOUT, ANNEALING, ANCHORS = range(5)  # purposes
RESOLUTION = 1 << 24  # values compared with a probability; float32 holds 0 .. 2**24 exactly
_GOLDEN = np.uint32(0x9E3779B9)  # 2**32 / golden ratio


def purpose_key(seed: jax.Array | int, purpose: int) -> jax.Array:
    """Returns the key from which all numbers of one purpose are folded."""
    return jax.random.fold_in(jax.random.key(seed), purpose)


def example_keys(seed: jax.Array | int, example_index: jax.Array, purpose: int = CORRUPTION) -> jax.Array:
    """Returns a key for each example, of one purpose: `example_index` [batch] to keys [batch]."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(purpose_key(seed, purpose), example_index)


def fold_keys(keys: jax.Array, data: int) -> jax.Array:
    """Folds one integer into each of `keys` [batch]."""
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, data)


def position_keys(keys: jax.Array, positions: jax.Array) -> jax.Array:
    """Folds a row's positions int [batch, n] into its key, of `keys` [batch]: returns keys [batch, n]."""
    return jax.vmap(jax.vmap(jax.random.fold_in, in_axes=(None, 0)))(keys, positions)


def dropout_seeds(seed: jax.Array | int, example_index: jax.Array) -> jax.Array:
    """Returns the uint32 seeds [batch] from which the dropout of each example is hashed."""
    return counter_hash(seed, DROPOUT, example_index)


def annealing_seed(seed: jax.Array | int, step: jax.Array | int) -> jax.Array:
    """Returns the uint32 seed of one step's annealed attention mask."""
    return counter_hash(seed, ANNEALING, step)


def counter_hash(*words: jax.Array | int, state: jax.Array | int = _GOLDEN) -> jax.Array:
    """Hashes integers, broadcast against each other, to uniform uint32 bits.

    Words are hashed from left to right; put the ones that vary least first, so that only the last round runs at full
    rank. `state` continues from the hash of earlier words: hash(a, b) is hash(b, state=hash(a)).
    """
    h = jnp.asarray(state).astype(jnp.uint32)
    for word in words:
        h = _mix((h ^ jnp.asarray(word).astype(jnp.uint32)) + _GOLDEN)
    return h


def _mix(h: jax.Array) -> jax.Array:
    """MurmurHash3's 32-bit finalizer: every input bit flips every output bit with probability 1/2."""
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> 16)


def threshold(probability: jax.Array | float) -> jax.Array | np.ndarray:
    """Returns how many of the RESOLUTION values count as true, int32; a constant for a constant probability."""
    xp = jnp if isinstance(probability, jax.Array) else np
    return xp.round(xp.asarray(probability, xp.float32) * RESOLUTION).astype(xp.int32)


def below(bits: jax.Array, threshold: jax.Array | int) -> jax.Array:
    """Returns True for `threshold` of the RESOLUTION values that the upper 24 bits take."""
    return (bits >> 8).astype(jnp.int32) < threshold


def bernoulli(bits: jax.Array, probability: jax.Array | float) -> jax.Array:
    """Returns True with a probability, decided by 24 of the bits: 0 is never and 1 is always, exactly."""
    return below(bits, threshold(probability))


def dropout(x: jax.Array, rate: float, seeds: jax.Array | None, *site: jax.Array | int,
            coordinates: Sequence[jax.Array] | None = None) -> jax.Array:
    """Applies inverted dropout to `x` [batch, ...], decided per element from (seed, site, coordinates).

    Args:
      seeds: uint32 [batch], one per example, so that the result does not depend on how examples are batched or
        sharded; None turns dropout off.
      site: integers that distinguish the places in the network that use the same seeds.
      coordinates: broadcast to `x`; for a slice of an array, its coordinates in the array. None: indices.
    """
    if seeds is None or rate == 0.0:
        return x
    index = [seeds.reshape((-1,) + (1,) * (x.ndim - 1)), *site]
    if coordinates is None:
        coordinates = [jax.lax.broadcasted_iota(jnp.uint32, (1,) * d + x.shape[d : d + 1] + (1,) * (x.ndim - d - 1), d)
                       for d in range(1, x.ndim)]
    drop = bernoulli(counter_hash(*index, *coordinates), rate)
    return jnp.where(drop, 0, x / (1.0 - rate)).astype(x.dtype)


def uniform_by_index(index: np.ndarray, seed: int, stream: int) -> np.ndarray:
    """Returns numbers in [0, 1) that depend on (seed, stream, index) only, float64; for the host.

    Args:
      index: int64 of any shape.
      stream: 0 or 1; the two streams of a seed are independent.

    The generator is splitmix64 (Steele, Lea and Flood, 2014).
    """
    with np.errstate(over="ignore"):
        x = index.astype(np.uint64) + np.uint64((seed * 2 + stream + 1) * 0x9E3779B97F4A7C15 % 2**64)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
        return ((x ^ (x >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53
