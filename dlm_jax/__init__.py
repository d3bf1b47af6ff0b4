"""dlm_jax: pretrained autoregressive language models become diffusion language models."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dlm_jax.attention import AttentionMask
    from dlm_jax.errors import DLMError
    from dlm_jax.models import ModelConfig
    from dlm_jax.parallel import MeshConfig
    from dlm_jax.pipeline import DiffusionLM

__version__ = "0.1.0"
__all__ = ["AttentionMask", "DLMError", "DiffusionLM", "MeshConfig", "ModelConfig", "__version__"]

# Looked up on first use, so that `import dlm_jax` and `dlm --help` do not wait for JAX.
_HOMES = {"AttentionMask": "attention", "DLMError": "errors", "DiffusionLM": "pipeline", "MeshConfig": "parallel",
          "ModelConfig": "models"}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'dlm_jax' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"dlm_jax.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
