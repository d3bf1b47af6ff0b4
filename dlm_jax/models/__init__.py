"""What the network is."""

from dlm_jax.models.cache import Cache
from dlm_jax.models.config import Compute, ModelConfig, RopeScaling
from dlm_jax.models.transformer import Transformer, abstract_model

__all__ = ["Cache", "Compute", "ModelConfig", "RopeScaling", "Transformer", "abstract_model"]
