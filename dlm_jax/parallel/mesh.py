"""The device mesh: four named axes, whose product is the number of devices."""

import dataclasses
import math

import jax
from jax.sharding import AxisType, Mesh

from dlm_jax.errors import ConfigError

AXES = ("data", "fsdp", "tensor", "context")


def _size(default: int, meaning: str) -> int:
    return dataclasses.field(default=default, metadata={"help": meaning})


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; at most one is -1 and takes the devices the others leave."""

    data: int = _size(1, "copies of the parameters, each with its own part of the batch")
    fsdp: int = _size(-1, "parts of the batch that, with context, also share the storage of parameters and optimizer")
    tensor: int = _size(1, "parts of every matrix product (heads, perceptron, vocabulary)")
    context: int = _size(1, "parts of the sequence")

    def sizes(self) -> tuple[int, int, int, int]:
        return self.data, self.fsdp, self.tensor, self.context


def make_mesh(config: MeshConfig = MeshConfig(), devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh over `devices` (default: all), with automatic axes: XLA inserts the communication.

    Raises:
      ConfigError: the sizes do not multiply to the number of devices.
    """
    sizes, devices = list(config.sizes()), devices or jax.devices()
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ConfigError(f"mesh sizes {config} must be positive, and at most one of them -1")
    if -1 in sizes:
        known = math.prod(size for size in sizes if size != -1)
        sizes[sizes.index(-1)] = max(len(devices) // known, 1)
    if math.prod(sizes) != len(devices):
        shape = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
        raise ConfigError(f"the mesh {shape} needs {math.prod(sizes)} devices, but there are {len(devices)}; "
                          "change mesh.* or set one of its axes to -1")
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def describe_mesh(mesh: Mesh) -> str:
    """For people: `8 x cpu: fsdp=8`, axes of size 1 left out."""
    shape = " ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1)
    kind = mesh.devices.flat[0].device_kind
    return f"{mesh.size} x {kind}" + (f": {shape}" if shape else "")
