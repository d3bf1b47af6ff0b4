"""Which backend attends: what each one needs, and what "auto" takes where."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dlm_jax.errors import ConfigError

BACKENDS = ("xla", "tpu", "cudnn")
_RENAMED = {"dense": "xla", "flash_tpu": "tpu"}
_FASTEST = {"tpu": "tpu", "gpu": "cudnn"}


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """What attention is asked for, as far as the choice of a backend depends on it."""

    dtype: str
    head_dim: int
    dropout: bool = False
    matrix: bool = False  # an explicit one, in place of a rule


class Choice(NamedTuple):
    """A backend, and in a few words why it is not the platform's fastest where it is not."""

    backend: str
    reason: str | None = None


class _Unsupported(NamedTuple):
    what: str
    remedy: str | None = None


def choose_backend(name: str, work: AttentionSpec, platform: str | None = None,
                   capability: tuple[int, int] | None = None) -> Choice:
    """The backend that `name` stands for.

    Args:
      platform: of the devices, as JAX calls it. None: for "auto" that of JAX's first device; a backend named is then
        taken to run elsewhere, which a program compiled ahead of time does.
      capability: the compute capability of GPUs that are not here; None: of those that are.

    Raises:
      ConfigError: there is no such backend, or it cannot do this work, or not there.
    """
    if name == "auto":
        platform = platform or jax.default_backend()
        name = _FASTEST.get(platform, "xla")
        obstacle = _obstacle(name, work, platform, capability)
        return Choice("xla", f"{name} {obstacle.what}") if obstacle else Choice(name)
    if name in _RENAMED:
        raise ConfigError(f"the attention backend {name!r} is now called {_RENAMED[name]!r}")
    if name not in BACKENDS:
        raise ConfigError(f"unknown attention backend {name!r}; choose auto or one of {', '.join(BACKENDS)}")
    if obstacle := _obstacle(name, work, platform, capability):
        remedy = f", or {obstacle.remedy}" if obstacle.remedy else ""
        raise ConfigError(f"the attention backend {name} {obstacle.what}; set model.attention=xla{remedy}")
    return Choice(name)


def _obstacle(name: str, work: AttentionSpec, platform: str | None, capability: tuple[int, ...] | None) -> _Unsupported | None:
    if name == "tpu":
        if platform not in (None, "tpu"):
            return _Unsupported(f"needs a TPU, and these devices are {platform}")
        return _Unsupported("evaluates masks by rule, and this one is an explicit matrix") if work.matrix else None
    return _cudnn_obstacle(work, platform, capability) if name == "cudnn" else None


def _cudnn_obstacle(work: AttentionSpec, platform: str | None, capability: tuple[int, ...] | None) -> _Unsupported | None:
    if platform not in (None, "gpu"):
        return _Unsupported(f"needs an NVIDIA GPU, and these devices are {platform}")
    if capability is None and not _has_cudnn():
        return _Unsupported("needs cuDNN, which JAX does not find", 'install "jax[cuda12]"')
    capability = capability or _capability()
    if capability < (8, 0):
        return _Unsupported(f"needs compute capability 8.0, and this GPU has {'.'.join(map(str, capability))}")
    if jnp.dtype(work.dtype) not in (jnp.bfloat16, jnp.float16):
        return _Unsupported(f"computes in bfloat16, and the model in {jnp.dtype(work.dtype).name}", "model.dtype=bfloat16")
    largest = 256 if capability >= (9, 0) else 128
    if work.head_dim % 8 or work.head_dim > largest:
        return _Unsupported(f"takes a head_dim of a multiple of 8 up to {largest}, and the model's is {work.head_dim}")
    if work.dropout:  # ours is a hash of example and place; cuDNN's is a stream that depends on batch and mesh
        return _Unsupported("has no attention dropout that is the same on every mesh, and the model's is not 0",
                         "model.dropout=0")
    return None


def _has_cudnn() -> bool:
    from jax._src.lib import cuda_versions  # what JAX itself asks; there is no public name for it

    return cuda_versions is not None


def _capability() -> tuple[int, ...]:
    """Of the first GPU, such as (9, 0) for Hopper; without one, of the oldest that cuDNN attends on."""
    gpus = [device for device in jax.local_devices() if device.platform == "gpu"]
    return tuple(int(part) for part in gpus[0].compute_capability.split(".")) if gpus else (8, 0)
