"""One table from logical axes to mesh axes, and the shardings that follow from it.

Parameters name their logical axes in `.axes`; optimizer state carries the same metadata, because optax
maps over the parameter tree. Nothing else in the library knows which axis is split how.
"""

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dlm_jax.attention import Partition
from dlm_jax.errors import ConfigError

BATCH_AXES = ("slices", "data", "fsdp")

RULES: dict[str | None, str | tuple[str, ...] | None] = {
    "batch": BATCH_AXES,
    "length": "context",
    "vocab": "tensor",
    "embed": ("fsdp", "context"),  # the parts of a sequence share the storage of parameters too
    "embed_blocks": ("fsdp", "context"),  # of the scales of a kernel that is quantised
    "mlp": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "rank": None,
    "layers": None,
    None: None,
}

# The same for attention, whose kernels XLA cannot split by itself.
ATTENTION_PARTITION = Partition(batch=BATCH_AXES, heads=RULES["heads"], length=RULES["length"])

# Vocabularies are seldom round (GPT-2: 50257, and a mask token adds one), and scales are small: what does not divide
# stays whole.
_MAY_STAY_WHOLE = ("vocab", "embed_blocks")


def is_param(node: object) -> bool:
    """True for the boxes that hold an array beside its logical axes."""
    return isinstance(node, nnx.Variable)


def spec_of(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh, name: str = "an array") -> PartitionSpec:
    """The partition of an array with these logical axes.

    Raises:
      ConfigError: an axis is not in the table, or its size is not a multiple of its mesh axis.
    """
    if len(axes) != len(shape):
        raise ConfigError(f"{name} has shape {shape} but names {len(axes)} logical axes {axes}")
    parts = []
    for axis, size in zip(axes, shape, strict=True):
        if axis not in RULES:
            raise ConfigError(f"{name} has the logical axis {axis!r}, which the sharding rules do not know")
        mesh_axes = RULES[axis]
        count = _count(mesh_axes, mesh)
        if size % count and axis in _MAY_STAY_WHOLE:
            mesh_axes = None
        elif size % count:
            raise ConfigError(f"the {axis} axis of {name} has size {size}, which the mesh axis {mesh_axes} "
                              f"of size {count} does not divide; choose another mesh")
        parts.append(mesh_axes)
    return PartitionSpec(*parts)


def param_shardings(params: nnx.State | nnx.Module, mesh: Mesh) -> nnx.State:
    """Shardings in the tree structure of `params` (a state or a module, arrays or shapes)."""
    if isinstance(params, nnx.Module):
        params = nnx.state(params)

    def place(path: tuple, param: nnx.Variable) -> nnx.Variable:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        spec = spec_of(param.axes, param.get_value().shape, mesh, name)
        return param.replace(NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(place, params, is_leaf=is_param)


def state_shardings(state: object, mesh: Mesh) -> object:
    """Shardings for anything built from parameters, such as optimizer state: it follows the parameter.

    What no longer has its parameter's shape (counters, Adafactor's row and column statistics) is small
    and lives whole on every device.
    """
    whole = NamedSharding(mesh, PartitionSpec())

    def place(node: object) -> object:
        if not is_param(node):
            return whole
        shape = node.get_value().shape
        counts = [_count(RULES[axis], mesh) for axis in node.axes]
        if len(shape) != len(counts) or any(size < count for size, count in zip(shape, counts, strict=True)):
            return node.replace(whole)
        return node.replace(NamedSharding(mesh, spec_of(node.axes, shape, mesh)))

    return jax.tree.map(place, state, is_leaf=is_param)


def array_sharding(mesh: Mesh, *axes: str | None) -> NamedSharding:
    """The sharding of an activation or input with these logical axes, e.g. `("batch", "length")`."""
    return NamedSharding(mesh, PartitionSpec(*(RULES[axis] for axis in axes)))


def batch_parts(mesh: Mesh) -> int:
    """Over how many parts of the mesh a batch is split."""
    return _count(BATCH_AXES, mesh)


def _count(mesh_axes: str | tuple[str, ...] | None, mesh: Mesh) -> int:
    names = (mesh_axes,) if isinstance(mesh_axes, str) else mesh_axes or ()
    count = 1
    for name in names:
        count *= mesh.shape[name]
    return count
