"""The sizes of the mesh, as a recipe gives them. It needs no JAX: a recipe is checked before JAX is imported."""

import dataclasses
import math

from dlm_jax.config_fields import field
from dlm_jax.errors import ConfigError

AXES = ("dcn_data", "data", "fsdp", "tensor", "context", "expert")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; at most one is -1 and takes the remaining devices."""

    dcn_data: int = field(1, "TPU slices (or groups of GPU hosts), each with a copy of the parameters: only sums of "
                             "gradients cross the slower network between them")
    data: int = field(1, "copies of the parameters, each with its own shard of the batch")
    fsdp: int = field(-1, "shards of the batch that, with context, also shard parameters and optimizer state")
    tensor: int = field(1, "shards of every matrix product (heads, MLP, vocabulary)")
    context: int = field(1, "shards of the sequence")
    expert: int = field(1, "shards of the batch that each hold some of the experts of a mixture, and of other "
                           "parameters their shard, as those of fsdp")

    def sizes(self) -> tuple[int, ...]:
        """Returns the sizes in the order of AXES."""
        return self.dcn_data, self.data, self.fsdp, self.tensor, self.context, self.expert


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
