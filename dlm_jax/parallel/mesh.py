"""The device mesh: five named axes, whose product is the number of devices."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from dlm_jax.errors import ConfigError

AXES = ("dcn_data", "data", "fsdp", "tensor", "context")


def _size(default: int, meaning: str) -> int:
    return dataclasses.field(default=default, metadata={"help": meaning})


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; at most one is -1 and takes the devices the others leave."""

    dcn_data: int = _size(1, "TPU slices (or groups of GPU hosts), each with a copy of the parameters: only the sums of "
                        "gradients cross the slower network between them")
    data: int = _size(1, "copies of the parameters, each with its own part of the batch")
    fsdp: int = _size(-1, "parts of the batch that, with context, also share the storage of parameters and optimizer")
    tensor: int = _size(1, "parts of every matrix product (heads, perceptron, vocabulary)")
    context: int = _size(1, "parts of the sequence")

    def sizes(self) -> tuple[int, int, int, int, int]:
        return self.dcn_data, self.data, self.fsdp, self.tensor, self.context


def make_mesh(config: MeshConfig = MeshConfig(), devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh over `devices` (default: all), with automatic axes: XLA inserts the communication.

    Raises:
      ConfigError: the sizes do not multiply to the number of devices, or the slices are not those of the hardware.
    """
    devices = devices or jax.devices()
    slices, *sizes = mesh_sizes(config, len(devices))
    arranged = [_arranged(sizes, part) for part in group_by_slice(devices, slices)]
    return Mesh(np.stack(arranged), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _arranged(sizes: Sequence[int], devices: Sequence[jax.Device]) -> np.ndarray:
    """The devices of a slice in this shape, so that neighbours on an axis are neighbours in the hardware."""
    try:
        return mesh_utils.create_device_mesh(sizes, devices)
    except NotImplementedError:  # whole axes of the torus do not make up the sizes
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)


def mesh_sizes(config: MeshConfig, num_devices: int) -> list[int]:
    """The size of each of AXES over so many devices.

    Raises:
      ConfigError: the sizes do not multiply to the number of devices.
    """
    sizes = list(config.sizes())
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ConfigError(f"mesh sizes {config} must be positive, and at most one of them -1")
    if -1 in sizes:
        known = math.prod(size for size in sizes if size != -1)
        sizes[sizes.index(-1)] = max(num_devices // known, 1)
    if math.prod(sizes) != num_devices:
        shape = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
        raise ConfigError(f"the mesh {shape} needs {math.prod(sizes)} devices, but there are {num_devices}; "
                          "change mesh.* or set one of its axes to -1")
    return sizes


def group_by_slice(devices: Sequence[jax.Device], count: int) -> list[list[jax.Device]]:
    """The devices of each of `count` slices.

    Slices of the hardware are taken as they are, or cut up further; devices that know of none (GPUs, CPUs) are cut up
    in their order, which keeps those of a host together.

    Raises:
      ConfigError: a part of the mesh would reach from one hardware slice into another.
    """
    physical = sorted({getattr(device, "slice_index", 0) for device in devices})
    if len(physical) > 1 and count % len(physical):
        raise ConfigError(f"the devices lie in {len(physical)} slices, which the mesh's dcn_data={count} would cut "
                          f"across; set mesh.dcn_data to {len(physical)}")
    ordered = sorted(devices, key=lambda device: getattr(device, "slice_index", 0))
    size = len(devices) // count
    return [ordered[start : start + size] for start in range(0, len(devices), size)]


def describe_mesh(mesh: Mesh) -> str:
    """For people: `8 x cpu: fsdp=8`, axes of size 1 left out."""
    shape = " ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1)
    kind = mesh.devices.flat[0].device_kind
    return f"{mesh.size} x {kind}" + (f": {shape}" if shape else "")
