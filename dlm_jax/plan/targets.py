"""What a step is planned for: a TPU slice, which the compiler knows, or GPUs by their description."""

import dataclasses
import re

from jax.sharding import AbstractMesh, AxisType, Mesh

from dlm_jax.attention import choose_backend
from dlm_jax.errors import ConfigError
from dlm_jax.models import ModelConfig
from dlm_jax.parallel import AXES, MeshConfig, make_mesh, mesh_sizes
from dlm_jax.parallel.chips import CHIPS, Chip
from dlm_jax.plan.memory import has_analytic_estimate
from dlm_jax.plan.topology import read_topology, tpu_devices
from dlm_jax.training.config import TrainConfig
from dlm_jax.training.setup import attention_spec, choose_attention

GPUS = tuple(chip.name for chip in CHIPS if not any(kind.startswith("TPU") for kind in chip.kinds))


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices to plan for.

    Attributes:
      mesh: of the devices; of GPUs, only its shape.
      attention: the backend that training chooses there, and in a few words why it is not the fastest, if it is not.
    """

    name: str
    chip: Chip
    mesh: Mesh | AbstractMesh
    attention: str
    reason: str | None
    num_slices: int = 1

    @property
    def is_compiled_for(self) -> bool:
        return isinstance(self.mesh, Mesh)


def tpu_target(config: TrainConfig, architecture: ModelConfig, name: str) -> Target:
    """A TPU slice, or several, by name: see `read_topology`."""
    topology = read_topology(name)
    mesh = make_mesh(config.mesh, tpu_devices(topology))
    chip = next(chip for chip in CHIPS if chip.name == topology.generation)
    attention = choose_attention(config, architecture, mesh)
    return Target(topology.name, chip, mesh, attention.backend, attention.reason, topology.slices)


def gpu_target(config: TrainConfig, architecture: ModelConfig, description: str) -> Target:
    """GPUs by description, such as `h100:8`.

    Raises:
      ConfigError: the GPU is not known or cannot do the attention that is asked for, or the mesh is not one that can
        be added up without compiling.
    """
    match = re.fullmatch(r"([\w-]+):(\d+)", description.lower())
    if not match or match[1] not in GPUS or int(match[2]) < 1:
        raise ConfigError(f"the GPUs {description!r} are not described as NAME:COUNT, such as h100:8; known names are "
                          f"{', '.join(GPUS)}")
    chip, mesh = next(chip for chip in CHIPS if chip.name == match[1]), described_mesh(config.mesh, int(match[2]))
    if not has_analytic_estimate(config, mesh.shape):
        raise ConfigError("planning for GPUs foresees a mesh that splits the batch alone, and nothing in the host's "
                          "memory: set mesh.tensor and mesh.context to 1, optimizer.offload to false and model.remat "
                          "to full, or plan for a TPU slice, which is compiled")
    attention = choose_backend(config.model.attention, attention_spec(config, architecture), "gpu", chip.capability)
    return Target(description.lower(), chip, mesh, attention.backend, attention.reason)


def described_mesh(config: MeshConfig, num_devices: int) -> AbstractMesh:
    """The shape of the mesh that `make_mesh` makes of so many devices."""
    return AbstractMesh(tuple(mesh_sizes(config, num_devices)), AXES, axis_types=(AxisType.Auto,) * len(AXES))
