"""A few digits that tell one set of parameters from another."""

import hashlib
import json
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from dlm_jax.attention.hashing import counter_hash


def fingerprint(params: nnx.State) -> str:
    """16 hexadecimal digits that depend on every bit of every parameter, and not on how they lie on devices."""
    return of_checksums({path: checksum(leaf[...]) for path, leaf in nnx.to_flat_state(params)})


def of_checksums(checksums: Mapping[tuple, jax.Array]) -> str:
    """The fingerprint of parameters by the `checksum` of each."""
    sums = {".".join(map(str, path)): int(checksum) for path, checksum in checksums.items()}
    return combined(json.dumps(sums, sort_keys=True))


def combined(*parts: str) -> str:
    """16 hexadecimal digits that depend on all parts."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


@jax.jit
def checksum(x: jax.Array) -> jax.Array:
    """The sum modulo 2**32, in which order is nothing, of a hash of each element's place and bits."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint16 if x.dtype == jnp.bfloat16 else jnp.uint32)
    place = [jax.lax.broadcasted_iota(jnp.uint32, (1,) * d + x.shape[d : d + 1] + (1,) * (x.ndim - d - 1), d)
             for d in range(x.ndim)]
    return jnp.sum(counter_hash(*place, bits.astype(jnp.uint32)), dtype=jnp.uint32)
