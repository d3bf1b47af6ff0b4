"""From host rows to global arrays, of which each process supplies only what its own devices hold, and back."""

import functools
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from dlm_jax.errors import ConfigError
from dlm_jax.parallel.rules import BATCH_AXES, array_sharding, batch_parts


def place_rows(read: Callable[[slice], object], num_rows: int, mesh: Mesh) -> object:
    """A pytree of global arrays: rows split over the batch axes, columns over the length's.

    Args:
      read: gives a pytree of numpy arrays [rows] or [rows, length] for a slice of the global rows; it is
        asked only for slices that devices of this process hold.
      num_rows: rows of the global batch.
    """
    parts = batch_parts(mesh)
    if num_rows % parts:
        raise ConfigError(f"a batch of {num_rows} rows does not divide over the {parts} parts of the mesh axes "
                          f"{' and '.join(BATCH_AXES)}; change the batch size or the mesh")
    size = num_rows // parts
    read_part = functools.cache(lambda start: jax.tree.flatten(read(slice(start, start + size))))

    first = next(iter(array_sharding(mesh, "batch").addressable_devices_indices_map((num_rows,)).values()))
    leaves, treedef = read_part(first[0].start or 0)

    def place(i: int, leaf: np.ndarray) -> jax.Array:
        shape = (num_rows, *leaf.shape[1:])
        sharding = array_sharding(mesh, *("batch", "length")[: leaf.ndim])
        return jax.make_array_from_callback(
            shape, sharding, lambda index: read_part(index[0].start or 0)[0][i][:, *index[1:]])

    return treedef.unflatten([place(i, leaf) for i, leaf in enumerate(leaves)])


def split_rows(array: np.ndarray, mesh: Mesh) -> jax.Array:
    """A host array [rows, ...] that every process has whole, as a global array with its rows split over the mesh."""
    return jax.make_array_from_callback(array.shape, array_sharding(mesh, "batch"), lambda index: array[index])


def to_host(array: jax.Array) -> np.ndarray:
    """The whole of an array that may lie on the devices of several processes."""
    if array.is_fully_addressable:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)
