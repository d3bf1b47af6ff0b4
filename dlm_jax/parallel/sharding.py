"""One table from logical axes to mesh axes, the shardings that follow from it, and batches split by it.

Parameters name their logical axes in `.axes`; optimizer state has the same metadata, because optax maps over the
parameter tree. Nothing else in the library knows which axis is split how.
"""

import contextlib
import functools
import math
from collections.abc import Callable

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dlm_jax.attention import Partition
from dlm_jax.errors import ConfigError

BATCH_AXES = ("dcn_data", "data", "fsdp", "expert")

RULES: dict[str | None, str | tuple[str, ...] | None] = {
    "batch": BATCH_AXES,
    "length": "context",
    "vocab": "tensor",
    # Shards of a sequence, and those of experts, also shard the parameters.
    "embed": ("fsdp", "context", "expert"),
    "embed_blocks": ("fsdp", "context", "expert"),  # of the scales of a quantized kernel
    "expert": "expert",
    "mlp": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "rank": None,
    "layers": None,
    None: None,
}

# The same for attention kernels, which XLA cannot split by itself.
ATTENTION_PARTITION = Partition(batch=BATCH_AXES, heads=RULES["heads"], length=RULES["length"],
                                experts=RULES["expert"])

# Replicated where their size does not divide: vocabularies are rarely round (GPT-2: 50257, plus a mask token), and
# scales are small.
_ALLOW_REPLICATED = ("vocab", "embed_blocks")


def is_param(node: object) -> bool:
    """Returns whether a tree node is a variable, which holds an array and its logical axes."""
    return isinstance(node, nnx.Variable)


def partition_spec(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh,
                   name: str = "an array") -> PartitionSpec:
    """Returns the partition of an array with these logical axes.

    A mesh axis that two of them name splits the first.

    Raises:
      ConfigError: an axis is not in the table, or its size is not a multiple of its mesh axis.
    """
    if len(axes) != len(shape):
        raise ConfigError(f"{name} has shape {shape} but names {len(axes)} logical axes {axes}")
    spec, used = [], set()
    for axis, size in zip(axes, shape, strict=True):
        if axis not in RULES:
            raise ConfigError(f"{name} has the logical axis {axis!r}, which the sharding rules do not know")
        mesh_axes = RULES[axis]
        if used and isinstance(mesh_axes, tuple):
            mesh_axes = tuple(name for name in mesh_axes if name not in used)
        count = _axes_size(mesh_axes, mesh)
        if size % count and axis in _ALLOW_REPLICATED:
            mesh_axes = None
        elif size % count:
            raise ConfigError(f"the {axis} axis of {name} has size {size}, which the mesh axis {mesh_axes} "
                              f"of size {count} does not divide; choose another mesh")
        spec.append(mesh_axes)
        used.update((mesh_axes,) if isinstance(mesh_axes, str) else mesh_axes or ())
    return PartitionSpec(*spec)


def param_shardings(params: nnx.State | nnx.Module, mesh: Mesh) -> nnx.State:
    """Returns shardings in the tree structure of `params` (a state or a module, of arrays or shapes)."""
    if isinstance(params, nnx.Module):
        params = nnx.state(params)

    def sharding(path: tuple, param: nnx.Variable) -> nnx.Variable:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        spec = partition_spec(param.axes, param.get_value().shape, mesh, name)
        return param.replace(NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(sharding, params, is_leaf=is_param)


def all_gather_embeddings(params: nnx.State, mesh: Mesh) -> nnx.State:
    """Gathers embedding tables along `embed`, once per step.

    A lookup in a table that is sharded along `embed` would move activations instead, which are larger.
    """
    def gather(param: nnx.Variable) -> nnx.Variable:
        if "layers" in param.axes or "embed" not in param.axes:
            return param
        axes = tuple(None if axis == "embed" else axis for axis in param.axes)
        value = param.get_value()
        return param.replace(jax.lax.with_sharding_constraint(
            value, NamedSharding(mesh, partition_spec(axes, value.shape, mesh))))

    return jax.tree.map(gather, params, is_leaf=is_param)


def state_shardings(state: object, mesh: Mesh) -> object:
    """Returns shardings for anything built from parameters, such as optimizer state: it follows its parameter.

    Leaves without their parameter's shape (counters, Adafactor's row and column statistics) are small and replicated.
    """
    replicated = NamedSharding(mesh, PartitionSpec())

    def sharding(node: object) -> object:
        if not is_param(node):
            return replicated
        if not jax.tree.leaves(node):  # optax's MaskedNode: another optimizer has this parameter
            return node
        shape = node.get_value().shape
        counts = [_axes_size(RULES[axis], mesh) for axis in node.axes]
        if len(shape) != len(counts) or any(size < count for size, count in zip(shape, counts, strict=True)):
            return node.replace(replicated)
        return node.replace(NamedSharding(mesh, partition_spec(node.axes, shape, mesh)))

    return jax.tree.map(sharding, state, is_leaf=is_param)


def array_sharding(mesh: Mesh, *axes: str | None) -> NamedSharding:
    """Returns the sharding of an activation or input with these logical axes, e.g. `("batch", "length")`."""
    return NamedSharding(mesh, PartitionSpec(*(RULES[axis] for axis in axes)))


def num_batch_shards(mesh: Mesh | None) -> int:
    """Returns the number of shards of a batch; 1 without a mesh."""
    return 1 if mesh is None else _axes_size(BATCH_AXES, mesh)


def use_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager:
    """Returns `jax.set_mesh`; without a mesh, a context that changes nothing."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def _axes_size(mesh_axes: str | tuple[str, ...] | None, mesh: Mesh) -> int:
    names = (mesh_axes,) if isinstance(mesh_axes, str) else mesh_axes or ()
    return math.prod(mesh.shape[name] for name in names)


def make_global_batch(read: Callable[[slice], object], num_rows: int, mesh: Mesh) -> object:
    """Returns a pytree of global arrays: rows split over the batch axes, columns over the length's.

    Args:
      read: returns a pytree of numpy arrays [rows] or [rows, length] for a slice of the global rows; it is called only
        for slices on this process's devices.
      num_rows: rows of the global batch.

    Raises:
      ConfigError: the rows do not divide over the mesh.
    """
    shards = num_batch_shards(mesh)
    if num_rows % shards:
        raise ConfigError(f"a batch of {num_rows} rows does not divide over the {shards} shards of the mesh axes "
                          f"{' and '.join(BATCH_AXES)}; change the batch size or the mesh")
    size = num_rows // shards
    read_shard = functools.cache(lambda start: jax.tree.flatten(read(slice(start, start + size))))

    first = next(iter(array_sharding(mesh, "batch").addressable_devices_indices_map((num_rows,)).values()))
    leaves, treedef = read_shard(first[0].start or 0)

    def place(i: int, leaf: np.ndarray) -> jax.Array:
        shape = (num_rows, *leaf.shape[1:])
        sharding = array_sharding(mesh, *("batch", "length")[: leaf.ndim])
        return jax.make_array_from_callback(
            shape, sharding, lambda index: read_shard(index[0].start or 0)[0][i][:, *index[1:]])

    return treedef.unflatten([place(i, leaf) for i, leaf in enumerate(leaves)])


def shard_batch(array: np.ndarray, mesh: Mesh) -> jax.Array:
    """Returns a host array [rows, ...], the same in every process, as a global array split by rows."""
    return jax.make_array_from_callback(array.shape, array_sharding(mesh, "batch"), lambda index: array[index])


def to_host(array: jax.Array) -> np.ndarray:
    """Returns a copy on the host of an array that may be sharded over several processes."""
    if array.is_fully_addressable:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)
