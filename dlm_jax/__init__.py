"""dlm_jax turns pretrained autoregressive language models into diffusion language models."""

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

# Imported on first use, so that `import dlm_jax` and `dlm --help` do not load JAX.
_MODULES = {"AttentionMask": "attention", "DLMError": "errors", "DiffusionLM": "pipeline", "MeshConfig": "parallel",
            "ModelConfig": "models"}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'dlm_jax' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"dlm_jax.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
