"""TPU slices by name: the devices that a program can be compiled for where there is no TPU."""

import dataclasses
import importlib.util
import math
import os
import re
from typing import TYPE_CHECKING

from dlm_jax.errors import ConfigError

if TYPE_CHECKING:
    import jax

GENERATIONS = ("v2", "v3", "v4", "v5e", "v5p", "v6e", "tpu7x")
_AXES = {"v2": 2, "v3": 2, "v4": 3, "v5e": 2, "v5p": 3, "v6e": 2, "tpu7x": 3}
_HOST = (2, 2, 1)  # chips of a host along each axis: a slice is made of whole hosts, or is a part of one

# The cloud's names give a number: of cores, two a chip, for the older and the large chips, else of chips.
_CLOUD = {"v2": 2, "v3": 2, "v4": 2, "v5p": 2, "v5litepod": 1, "v5e": 1, "v6e": 1}
# The shapes of so many chips (cloud.google.com/tpu/docs/v4, v5e, v5p, v6e); where there are several, the most cubic.
_FLAT = {1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16),
         512: (16, 32), 1024: (32, 32)}
_CUBIC = {4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4), 64: (4, 4, 4), 128: (4, 4, 8), 256: (4, 8, 8),
          512: (8, 8, 8), 1024: (8, 8, 16), 2048: (8, 16, 16), 4096: (16, 16, 16)}

_NAME = re.compile(r"(?:(?P<slices>\d+)x)?(?P<generation>[a-z]\w*)(?::(?P<shape>\d+(?:x\d+){1,2})|-(?P<number>\d+))")


# Before libtpu is loaded: it is to look for no machine around it, nor to tell that it finds none, and several processes
# may load it at once, as none of them holds a device.
_LIBTPU = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost",
           "TPU_STDERR_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Slices of a generation of TPU, `slices` of them joined by the data centre's network, each of `shape` chips."""

    generation: str
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def name(self) -> str:
        """As JAX and this library spell it: `v5e:4x4`, `2xv5e:16x16`."""
        one = f"{self.generation}:{'x'.join(map(str, self.shape))}"
        return one if self.slices == 1 else f"{self.slices}x{one}"

    @property
    def num_chips(self) -> int:
        return self.slices * math.prod(self.shape)


def read_topology(text: str) -> Topology:
    """`v5e:4x4` or, as the cloud names it, `v5litepod-16`, `v4-32` (16 chips); `2xv5e:16x16` for two slices.

    Raises:
      ConfigError: there is no such name, generation or shape.
    """
    match = _NAME.fullmatch(text)
    if not match:
        raise ConfigError(f"the topology {text!r} is not named GENERATION:SHAPE, such as v5e:4x4, v5p:2x2x4, or "
                          "2xv5e:16x16 for two slices, nor as the cloud does, such as v5litepod-16")
    generation, slices = match["generation"], int(match["dcn_data"] or 1)
    if match["number"]:
        generation, shape = _cloud_shape(text, generation, int(match["number"]))
    else:
        shape = tuple(map(int, match["shape"].split("x")))
    if generation not in GENERATIONS:
        raise ConfigError(f"the topology {text!r} is of an unknown generation; known are {', '.join(GENERATIONS)}")
    if len(shape) != _AXES[generation]:
        raise ConfigError(f"the topology {text!r} has {len(shape)} axes, but those of {generation} have "
                          f"{_AXES[generation]}")
    broken = any(size % host for size, host in zip(shape, _HOST, strict=False))
    if math.prod(shape) * slices < 1 or (broken and math.prod(shape) > 2):
        raise ConfigError(f"the topology {text!r} is not made of hosts of {'x'.join(map(str, _HOST[:len(shape)]))} "
                          "chips")
    return Topology(generation, shape, slices)


def tpu_devices(topology: Topology) -> "list[jax.Device]":
    """The devices of a topology, to build a mesh of and compile for; nothing can run on them.

    Raises:
      ConfigError: libtpu, which compiles, is not installed, or does not know the topology.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError('compiling for a TPU needs its compiler, which is not installed here: '
                          'pip install "dlm_jax[tpu]"')
    import jax
    from jax.experimental import topologies

    for variable, value in _LIBTPU.items():
        os.environ.setdefault(variable, value)
    options = {} if topology.slices == 1 else {"num_slices": topology.slices}
    if topology.generation == "v4":
        options["chip_config_name"] = "megacore"  # both cores of a chip are one device, as on the machines themselves
    shape = (*topology.shape, 1)[:3]
    if any(size % host for size, host in zip(shape, _HOST, strict=True)):
        options["chips_per_host_bounds"] = shape
    name = f"{topology.generation}:{'x'.join(map(str, topology.shape))}"
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices)
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        raise ConfigError(f"libtpu cannot describe the topology {name}: {' '.join(str(error).split())}") from error


def _cloud_shape(text: str, generation: str, number: int) -> tuple[str, tuple[int, ...]]:
    if generation not in _CLOUD:
        raise ConfigError(f"the topology {text!r} names a number of chips of an unknown generation; write "
                          "GENERATION:SHAPE, such as v5e:4x4")
    chips, rest = divmod(number, _CLOUD[generation])
    generation = "v5e" if generation == "v5litepod" else generation
    shapes = _FLAT if _AXES[generation] == 2 else _CUBIC
    if rest or chips not in shapes:
        params = ", ".join(str(size * _CLOUD.get(generation, 1)) for size in shapes)
        raise ConfigError(f"the topology {text!r} has no usual shape; numbers that have one are {params}: write "
                          "others as GENERATION:SHAPE")
    return generation, shapes[chips]
