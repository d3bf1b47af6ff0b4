"""dlm_jax turns pretrained autoregressive language models into diffusion language models."""

from typing import TYPE_CHECKING

from dlm_jax.lazy import lazy_names

if TYPE_CHECKING:
    from dlm_jax.attention import AttentionMask
    from dlm_jax.errors import DLMError
    from dlm_jax.models import ModelConfig
    from dlm_jax.parallel import MeshConfig
    from dlm_jax.pipeline import DiffusionLM

__version__ = "0.1.0"
__all__ = ["AttentionMask", "DLMError", "DiffusionLM", "MeshConfig", "ModelConfig", "__version__"]

__getattr__, __dir__, _ = lazy_names(__name__, {
    "attention": ("AttentionMask",),
    "errors": ("DLMError",),
    "models": ("ModelConfig",),
    "parallel": ("MeshConfig",),
    "pipeline": ("DiffusionLM",),
})
