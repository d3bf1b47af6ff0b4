"""Counter-based random bits: a hash of integer coordinates, the same on every device, mesh and backend.

Randomness that lives inside attention (annealing, dropout) must be computable for any tile of the
[length, length] square without the rest of it, so it is a pure function of coordinates and not a stream.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

_GOLDEN = np.uint32(0x9E3779B9)  # 2**32 / golden ratio
RESOLUTION = 1 << 24  # bits compared with a probability; float32 holds 0 .. 2**24 exactly


def _mix(h: jax.Array) -> jax.Array:
    """MurmurHash3's 32-bit finaliser: every input bit flips every output bit with probability 1/2."""
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> 16)


def counter_hash(*words: jax.Array | int, state: jax.Array | int = _GOLDEN) -> jax.Array:
    """Hashes integers, broadcast against each other, to uniform uint32 bits.

    Words are absorbed left to right; put the ones that vary least first, so that only the last
    absorption runs at full rank. `state` goes on from the hash of earlier words: hash(a, b) is hash(b, state=hash(a)).
    """
    h = jnp.asarray(state).astype(jnp.uint32)
    for word in words:
        h = _mix((h ^ jnp.asarray(word).astype(jnp.uint32)) + _GOLDEN)
    return h


def threshold(probability: jax.Array | float) -> jax.Array | np.ndarray:
    """How many of the 2**24 values of a draw stand for true, int32; a constant where the probability is one."""
    xp = jnp if isinstance(probability, jax.Array) else np
    return xp.round(xp.asarray(probability, xp.float32) * RESOLUTION).astype(xp.int32)


def below(bits: jax.Array, threshold: jax.Array | int) -> jax.Array:
    """True for `threshold` of the 2**24 values that the upper bits take."""
    return (bits >> 8).astype(jnp.int32) < threshold


def bernoulli(bits: jax.Array, probability: jax.Array | float) -> jax.Array:
    """True with the given probability, decided by 24 of the bits: 0 is never and 1 is always, exactly."""
    return below(bits, threshold(probability))


def dropout(x: jax.Array, rate: float, seeds: jax.Array | None, *site: jax.Array | int,
            coordinates: Sequence[jax.Array] | None = None) -> jax.Array:
    """Inverted dropout on `x` [batch, ...], decided element by element from (seed, site, coordinates).

    Args:
      seeds: uint32 [batch], one per example, so that the result does not depend on how examples are
        batched or sharded; None turns dropout off.
      site: integers that tell apart the places in the network that use the same seeds.
      coordinates: what broadcasts to `x`, for a part of an array that decides as the whole would; None: indices.
    """
    if seeds is None or rate == 0.0:
        return x
    index = [seeds.reshape((-1,) + (1,) * (x.ndim - 1)), *site]
    if coordinates is None:
        coordinates = [jax.lax.broadcasted_iota(jnp.uint32, (1,) * d + x.shape[d : d + 1] + (1,) * (x.ndim - d - 1), d)
                       for d in range(1, x.ndim)]
    drop = bernoulli(counter_hash(*index, *coordinates), rate)
    return jnp.where(drop, 0, x / (1.0 - rate)).astype(x.dtype)


# ---- Every random number is a function of (seed, purpose, step or global example index) and of nothing else.


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
