"""The choice of an attention backend: what each one supports, and what "auto" takes on which platform."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dlm_jax.errors import ConfigError

BACKENDS = ("xla", "tpu", "cudnn")
_FASTEST = {"tpu": "tpu", "gpu": "cudnn"}  # by platform; elsewhere xla


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """The properties of an attention call on which the choice of a backend depends."""

    dtype: str
    head_dim: int
    dropout: bool = False
    matrix: bool = False  # the mask is an explicit matrix, not a rule
    softcap: bool = False  # scores have a soft cap


class BackendChoice(NamedTuple):
    """A backend, and why it is not the platform's fastest; None where it is."""

    backend: str
    reason: str | None = None


class _Unsupported(NamedTuple):
    reason: str
    remedy: str | None = None


def choose_backend(name: str, spec: AttentionSpec, platform: str | None = None,
                   capability: tuple[int, int] | None = None) -> BackendChoice:
    """Returns the backend that `name` means: one of BACKENDS, or "auto".

    Args:
      platform: JAX's name for the platform of the devices. None: for "auto" that of JAX's first device; a named backend
        is then taken to run elsewhere, as a program compiled ahead of time does.
      capability: the compute capability of GPUs that are not attached; None: that of the attached ones.

    Raises:
      ConfigError: the backend does not exist, or does not support `spec` or the platform.
    """
    if name == "auto":
        platform = platform or jax.default_backend()
        name = _FASTEST.get(platform, "xla")
        unsupported = _unsupported(name, spec, platform, capability)
        return BackendChoice("xla", f"{name} {unsupported.reason}") if unsupported else BackendChoice(name)
    if name not in BACKENDS:
        raise ConfigError(f"unknown attention backend {name!r}; choose auto or one of {', '.join(BACKENDS)}")
    if unsupported := _unsupported(name, spec, platform, capability):
        remedy = f", or {unsupported.remedy}" if unsupported.remedy else ""
        raise ConfigError(f"the attention backend {name} {unsupported.reason}; set model.attention=xla{remedy}")
    return BackendChoice(name)


def _unsupported(name: str, spec: AttentionSpec, platform: str | None,
                 capability: tuple[int, ...] | None) -> _Unsupported | None:
    if name == "tpu":
        if platform not in (None, "tpu"):
            return _Unsupported(f"needs a TPU, and these devices are {platform}")
        return _Unsupported("evaluates masks by rule, and this one is an explicit matrix") if spec.matrix else None
    return _unsupported_by_cudnn(spec, platform, capability) if name == "cudnn" else None


def _unsupported_by_cudnn(spec: AttentionSpec, platform: str | None,
                          capability: tuple[int, ...] | None) -> _Unsupported | None:
    if platform not in (None, "gpu"):
        return _Unsupported(f"needs an NVIDIA GPU, and these devices are {platform}")
    if capability is None and not _has_cudnn():
        return _Unsupported("needs cuDNN, which JAX does not find", 'install "jax[cuda12]"')
    capability = capability or _capability()
    if capability < (8, 0):
        return _Unsupported(f"needs compute capability 8.0, and this GPU has {'.'.join(map(str, capability))}")
    dtype = jnp.dtype(spec.dtype)
    if dtype not in (jnp.bfloat16, jnp.float16):
        return _Unsupported(f"computes in bfloat16, and the model in {dtype.name}", "model.dtype=bfloat16")
    largest = 256 if capability >= (9, 0) else 128
    if spec.head_dim % 8 or spec.head_dim > largest:
        return _Unsupported(f"takes a head_dim of a multiple of 8 up to {largest}, and the model's is {spec.head_dim}")
    if spec.softcap:
        return _Unsupported("has no soft cap of scores, which the model's attention has")
    if spec.dropout:  # ours is a hash of example and position; cuDNN's stream depends on batch and mesh
        return _Unsupported("has no attention dropout that is the same on every mesh, and the model's is not 0",
                            "model.dropout=0")
    return None


def _has_cudnn() -> bool:
    from jax._src.lib import cuda_versions  # JAX's own check; it has no public name

    return cuda_versions is not None


def _capability() -> tuple[int, ...]:
    """Returns the first GPU's compute capability, such as (9, 0) for Hopper; without a GPU the oldest supported one."""
    gpus = [device for device in jax.local_devices() if device.platform == "gpu"]
    return tuple(int(number) for number in gpus[0].compute_capability.split(".")) if gpus else (8, 0)
