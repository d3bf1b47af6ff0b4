"""The devices that a recipe is planned for: TPU slices by name, which are compiled for, and GPUs by description."""

import dataclasses
import importlib.util
import math
import os
import re
from typing import NamedTuple

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh

from dlm_jax.attention import choose_backend
from dlm_jax.errors import ConfigError
from dlm_jax.models import ModelConfig
from dlm_jax.parallel import AXES, make_mesh, mesh_sizes
from dlm_jax.parallel.chips import CHIPS, Chip
from dlm_jax.training.config import TrainConfig
from dlm_jax.training.setup import attention_spec, choose_attention

GPUS = tuple(chip.name for chip in CHIPS if chip.capability)

# The axes of each generation's torus, and what the number in its cloud name counts per chip: cores, or the chip itself.
_GENERATIONS = {"v2": (2, 2), "v3": (2, 2), "v4": (3, 2), "v5e": (2, 1), "v5p": (3, 2), "v6e": (2, 1),
                "tpu7x": (3, None)}
_HOST = (2, 2, 1)  # chips of a host along each axis: a slice has a multiple of them, or fits in one host
_NAME = re.compile(r"(?:(?P<slices>\d+)x)?(?P<generation>[a-z]\w*)(?::(?P<shape>\d+(?:x\d+){1,2})|-(?P<number>\d+))")

# Set before libtpu is loaded: it must not search for a machine, nor log that there is none, and several processes may
# load it at once, since none of them holds a device.
_LIBTPU = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost",
           "TPU_STDERR_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}


class Topology(NamedTuple):
    """`slices` TPU slices of one generation, each of `shape` chips, joined by the data-center network."""

    generation: str
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def name(self) -> str:
        """As JAX spells it, with the number of slices before it: `v5e:4x4`, `2xv5e:16x16`."""
        return f"{self.slices}x" * (self.slices > 1) + f"{self.generation}:{'x'.join(map(str, self.shape))}"


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
    attention = choose_attention(config, architecture, mesh)
    return Target(topology.name, _chip(topology.generation), mesh, attention.backend, attention.reason, topology.slices)


def gpu_target(config: TrainConfig, architecture: ModelConfig, description: str) -> Target:
    """Returns GPUs by description, such as `h100:8`.

    Raises:
      ConfigError: the GPU is unknown or lacks the requested attention backend, or memory cannot be estimated on this
        mesh.
    """
    name, _, count = description.lower().partition(":")
    if name not in GPUS or not count.isdecimal() or int(count) < 1:
        raise ConfigError(f"the GPUs {description!r} are not described as NAME:COUNT, such as h100:8; known names are "
                          f"{', '.join(GPUS)}")
    chip, sizes = _chip(name), tuple(mesh_sizes(config.mesh, int(count)))
    mesh = AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    offloads = config.optimizer.offload or config.model.remat == "offload"
    if offloads or mesh.shape["tensor"] * mesh.shape["context"] * mesh.shape["expert"] > 1:
        raise ConfigError("planning for GPUs needs a mesh that shards only the batch and nothing offloaded to host "
                          "memory: set mesh.tensor, mesh.context and mesh.expert to 1, optimizer.offload to false and "
                          "model.remat to full, or plan for a TPU slice, which is compiled")
    attention = choose_backend(config.model.attention, attention_spec(config, architecture), "gpu", chip.capability)
    return Target(description.lower(), chip, mesh, attention.backend, attention.reason)


def read_topology(text: str) -> Topology:
    """Parses `v5e:4x4`, `2xv5e:16x16` (two slices), or a cloud name: `v5litepod-16`, `v4-32` (16 chips).

    Raises:
      ConfigError: the name, generation or shape does not exist.
    """
    match = _NAME.fullmatch(text.replace("v5litepod", "v5e"))
    if not match or match["generation"] not in _GENERATIONS:
        raise ConfigError(f"the topology {text!r} is not named GENERATION:SHAPE, such as v5e:4x4, v5p:2x2x4, or "
                          "2xv5e:16x16 for two slices, nor by its cloud name, such as v5litepod-16; generations are "
                          + ", ".join(_GENERATIONS))
    generation, slices = match["generation"], int(match["slices"] or 1)
    shape = (_cloud_shape(generation, int(match["number"])) if match["number"]
             else tuple(map(int, match["shape"].split("x"))))
    if shape is None:
        raise ConfigError(f"the topology {text!r} has no usual shape; write GENERATION:SHAPE, such as v5e:4x4")
    host, chips = _HOST[:_GENERATIONS[generation][0]], math.prod(shape)
    if len(shape) != len(host) or chips * slices < 1 or (_is_partial_host(shape) and chips > 2):
        raise ConfigError(f"the topology {text!r} is not a multiple of hosts of {'x'.join(map(str, host))} chips")
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
    if _is_partial_host(topology.shape):
        options["chips_per_host_bounds"] = (*topology.shape, 1)[:3]
    name = Topology(topology.generation, topology.shape).name
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices)
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        raise ConfigError(f"libtpu cannot describe the topology {name}: {' '.join(str(error).split())}") from error


def _chip(name: str) -> Chip:
    return next(chip for chip in CHIPS if chip.name == name)


def _is_partial_host(shape: tuple[int, ...]) -> bool:
    return any(size % host for size, host in zip(shape, _HOST, strict=False))


def _cloud_shape(generation: str, number: int) -> tuple[int, ...] | None:
    """Returns the most cubic shape of a power of two of chips, as Google assigns it, with the longest axis last."""
    axes, unit = _GENERATIONS[generation]
    chips, rest = divmod(number, unit) if unit else (0, 0)
    exponent = chips.bit_length() - 1
    if rest or chips.bit_count() != 1 or (chips < 4 and (axes, chips) != (2, 1)):
        return None
    shape = tuple(2 ** ((exponent + axis) // axes) for axis in range(axes))
    return (2, 2, 1) if shape == (1, 2, 2) else shape  # one host
