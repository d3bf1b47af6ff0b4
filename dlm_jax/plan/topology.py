"""The devices that a recipe is planned for: TPU slices by name, which are compiled for, and GPUs by description."""

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Mapping

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh

from dlm_jax.attention import choose_backend
from dlm_jax.errors import ConfigError
from dlm_jax.models import ModelConfig
from dlm_jax.parallel import AXES, MeshConfig, make_mesh, mesh_sizes
from dlm_jax.parallel.chips import CHIPS, Chip
from dlm_jax.training.config import TrainConfig
from dlm_jax.training.setup import attention_spec, choose_attention

GPUS = tuple(chip.name for chip in CHIPS if not any(kind.startswith("TPU") for kind in chip.kinds))

# The axes of each generation's torus.
_AXES = {"v2": 2, "v3": 2, "v4": 3, "v5e": 2, "v5p": 3, "v6e": 2, "tpu7x": 3}
_HOST = (2, 2, 1)  # chips of a host along each axis: a slice has a multiple of them, or fits in one host

# The number in a cloud name counts cores on older and large chips, two per chip, and chips on the others.
_CORES = {"v2": 2, "v3": 2, "v4": 2, "v5p": 2, "v5litepod": 1, "v5e": 1, "v6e": 1}
# Shapes by number of chips (cloud.google.com/tpu/docs/v4, v5e, v5p, v6e); of several, the most cubic.
_FLAT = {1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16),
         512: (16, 32), 1024: (32, 32)}
_CUBIC = {4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4), 64: (4, 4, 4), 128: (4, 4, 8), 256: (4, 8, 8),
          512: (8, 8, 8), 1024: (8, 8, 16), 2048: (8, 16, 16), 4096: (16, 16, 16)}

_NAME = re.compile(r"(?:(?P<slices>\d+)x)?(?P<generation>[a-z]\w*)(?::(?P<shape>\d+(?:x\d+){1,2})|-(?P<number>\d+))")

# Set before libtpu is loaded: it must not search for a machine, nor log that there is none, and several processes may
# load it at once, since none of them holds a device.
_LIBTPU = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost",
           "TPU_STDERR_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}


@dataclasses.dataclass(frozen=True)
class Topology:
    """`slices` TPU slices of one generation, each of `shape` chips, joined by the data-center network."""

    generation: str
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def name(self) -> str:
        """As JAX spells it, with the number of slices before it: `v5e:4x4`, `2xv5e:16x16`."""
        one = f"{self.generation}:{'x'.join(map(str, self.shape))}"
        return one if self.slices == 1 else f"{self.slices}x{one}"

    @property
    def num_chips(self) -> int:
        return self.slices * math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices to plan for.

    Attributes:
      mesh: of devices for a TPU; only the shape for GPUs.
      attention: the backend that training chooses there.
      reason: why it is not the fastest backend, if it is not.
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
    """Returns one or more TPU slices by name (`read_topology`)."""
    topology = read_topology(name)
    mesh = make_mesh(config.mesh, tpu_devices(topology))
    chip = next(chip for chip in CHIPS if chip.name == topology.generation)
    attention = choose_attention(config, architecture, mesh)
    return Target(topology.name, chip, mesh, attention.backend, attention.reason, topology.slices)


def gpu_target(config: TrainConfig, architecture: ModelConfig, description: str) -> Target:
    """Returns GPUs by description, such as `h100:8`.

    Raises:
      ConfigError: the GPU is unknown or lacks the requested attention backend, or memory has no analytic estimate on
        this mesh.
    """
    match = re.fullmatch(r"([\w-]+):(\d+)", description.lower())
    if not match or match[1] not in GPUS or int(match[2]) < 1:
        raise ConfigError(f"the GPUs {description!r} are not described as NAME:COUNT, such as h100:8; known names are "
                          f"{', '.join(GPUS)}")
    chip, mesh = next(chip for chip in CHIPS if chip.name == match[1]), abstract_mesh(config.mesh, int(match[2]))
    if not has_analytic_estimate(config, mesh.shape):
        raise ConfigError("planning for GPUs needs a mesh that shards only the batch and nothing offloaded to host "
                          "memory: set mesh.tensor and mesh.context to 1, optimizer.offload to false and model.remat "
                          "to full, or plan for a TPU slice, which is compiled")
    attention = choose_backend(config.model.attention, attention_spec(config, architecture), "gpu", chip.capability)
    return Target(description.lower(), chip, mesh, attention.backend, attention.reason)


def abstract_mesh(config: MeshConfig, num_devices: int) -> AbstractMesh:
    """Returns the shape of the mesh that `make_mesh` makes of `num_devices`."""
    return AbstractMesh(tuple(mesh_sizes(config, num_devices)), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def has_analytic_estimate(config: TrainConfig, sizes: Mapping[str, int]) -> bool:
    """Returns whether memory can be estimated without compiling: `sizes` shard only the batch, nothing is offloaded."""
    offloads = config.optimizer.offload or config.model.remat == "offload"
    return sizes["tensor"] * sizes["context"] == 1 and not offloads


def read_topology(text: str) -> Topology:
    """Parses `v5e:4x4`, `2xv5e:16x16` (two slices), or a cloud name: `v5litepod-16`, `v4-32` (16 chips).

    Raises:
      ConfigError: the name, generation or shape does not exist.
    """
    match = _NAME.fullmatch(text)
    if not match:
        raise ConfigError(f"the topology {text!r} is not named GENERATION:SHAPE, such as v5e:4x4, v5p:2x2x4, or "
                          "2xv5e:16x16 for two slices, nor by its cloud name, such as v5litepod-16")
    generation, slices = match["generation"], int(match["slices"] or 1)
    if match["number"]:
        generation, shape = _cloud_shape(text, generation, int(match["number"]))
    else:
        shape = tuple(map(int, match["shape"].split("x")))
    if generation not in _AXES:
        raise ConfigError(f"the topology {text!r} is of an unknown generation; known are {', '.join(_AXES)}")
    if len(shape) != _AXES[generation]:
        raise ConfigError(f"the topology {text!r} has {len(shape)} axes, but {generation} has {_AXES[generation]}")
    partial_host = any(size % host for size, host in zip(shape, _HOST, strict=False))
    if math.prod(shape) * slices < 1 or (partial_host and math.prod(shape) > 2):
        host = "x".join(map(str, _HOST[:len(shape)]))
        raise ConfigError(f"the topology {text!r} is not a multiple of hosts of {host} chips")
    return Topology(generation, shape, slices)


def tpu_devices(topology: Topology) -> list[jax.Device]:
    """Returns the devices of a topology, to compile for; nothing can run on them.

    Raises:
      ConfigError: libtpu, the compiler, is not installed or does not know the topology.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError("compiling for a TPU needs its compiler, which is not installed here: "
                          'pip install "dlm_jax[tpu]"')
    from jax.experimental import topologies

    for variable, value in _LIBTPU.items():
        os.environ.setdefault(variable, value)
    options = {} if topology.slices == 1 else {"num_slices": topology.slices}
    if topology.generation == "v4":
        options["chip_config_name"] = "megacore"  # both cores of a chip are one device, as on real machines
    shape = (*topology.shape, 1)[:3]
    if any(size % host for size, host in zip(shape, _HOST, strict=True)):
        options["chips_per_host_bounds"] = shape
    name = f"{topology.generation}:{'x'.join(map(str, topology.shape))}"
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices)
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        raise ConfigError(f"libtpu cannot describe the topology {name}: {' '.join(str(error).split())}") from error


def _cloud_shape(text: str, generation: str, number: int) -> tuple[str, tuple[int, ...]]:
    if generation not in _CORES:
        raise ConfigError(f"the topology {text!r} names a number of chips of an unknown generation; write "
                          "GENERATION:SHAPE, such as v5e:4x4")
    chips, rest = divmod(number, _CORES[generation])
    generation = "v5e" if generation == "v5litepod" else generation
    shapes = _FLAT if _AXES[generation] == 2 else _CUBIC
    if rest or chips not in shapes:
        numbers = ", ".join(str(size * _CORES[generation]) for size in shapes)
        raise ConfigError(f"the topology {text!r} has no usual shape; numbers that have one are {numbers}: write "
                          "others as GENERATION:SHAPE")
    return generation, shapes[chips]
