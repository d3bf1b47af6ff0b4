"""The device mesh: six named axes, whose product is the number of devices."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from dlm_jax.errors import ConfigError
from dlm_jax.parallel.config import AXES, MeshConfig, mesh_sizes


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
