"""The device mesh: five named axes, whose product is the number of devices."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from dlm_jax.config_fields import field
from dlm_jax.errors import ConfigError

AXES = ("dcn_data", "data", "fsdp", "tensor", "context")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; at most one is -1 and takes the remaining devices."""

    dcn_data: int = field(1, "TPU slices (or groups of GPU hosts), each with a copy of the parameters: only sums of "
                             "gradients cross the slower network between them")
    data: int = field(1, "copies of the parameters, each with its own shard of the batch")
    fsdp: int = field(-1, "shards of the batch that, with context, also shard parameters and optimizer state")
    tensor: int = field(1, "shards of every matrix product (heads, MLP, vocabulary)")
    context: int = field(1, "shards of the sequence")

    def sizes(self) -> tuple[int, int, int, int, int]:
        """Returns the sizes in the order of AXES."""
        return self.dcn_data, self.data, self.fsdp, self.tensor, self.context


def make_mesh(config: MeshConfig = MeshConfig(), devices: list[jax.Device] | None = None) -> Mesh:
    """Returns the mesh over `devices` (default: all), with automatic axes: XLA inserts the communication.

    Raises:
      ConfigError: the sizes do not multiply to the number of devices, or do not fit the hardware's slices.
    """
    devices = devices or jax.devices()
    count, *sizes = mesh_sizes(config, len(devices))
    slices = [_device_mesh(sizes, group) for group in group_by_slice(devices, count)]
    return Mesh(np.stack(slices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _device_mesh(sizes: Sequence[int], devices: Sequence[jax.Device]) -> np.ndarray:
    """Arranges the devices of a slice so that neighbors on a mesh axis are neighbors in the hardware."""
    try:
        return mesh_utils.create_device_mesh(sizes, devices)
    except NotImplementedError:  # the sizes are not products of the torus's axes
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)


def mesh_sizes(config: MeshConfig, num_devices: int) -> list[int]:
    """Returns the size of each of AXES over `num_devices` devices.

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
    """Groups devices into `count` slices.

    Hardware slices are kept, or divided further. Devices without slices (GPUs, CPUs) are divided in their order, which
    keeps those of a host together.

    Raises:
      ConfigError: a group would span two hardware slices.
    """
    physical = sorted({getattr(device, "slice_index", 0) for device in devices})
    if len(physical) > 1 and count % len(physical):
        raise ConfigError(f"mesh.dcn_data={count} does not fit the {len(physical)} slices of these devices; set "
                          f"mesh.dcn_data to {len(physical)}")
    ordered = sorted(devices, key=lambda device: getattr(device, "slice_index", 0))
    size = len(devices) // count
    return [ordered[start : start + size] for start in range(0, len(devices), size)]


def describe_mesh(mesh: Mesh) -> str:
    """Returns a description such as `8 x cpu: fsdp=8`, without axes of size 1."""
    shape = " ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1)
    kind = mesh.devices.flat[0].device_kind
    return f"{mesh.size} x {kind}" + (f": {shape}" if shape else "")
