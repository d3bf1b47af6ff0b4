"""What the network is."""

from dlm_jax.models.adapt import (
    add_lora,
    add_product,
    base_shapes,
    freeze,
    kernel_norms,
    merge_lora,
    new_factors,
    split_factors,
    split_trained,
    with_magnitudes,
)
from dlm_jax.models.cache import Cache
from dlm_jax.models.config import Compute, ModelConfig, RopeScaling
from dlm_jax.models.fingerprint import combined, fingerprint
from dlm_jax.models.lora import LoraConfig, LoraFactor, LoraParam
from dlm_jax.models.transformer import Transformer, abstract_model

__all__ = ["Cache", "Compute", "LoraConfig", "LoraFactor", "LoraParam", "ModelConfig", "RopeScaling", "Transformer",
           "abstract_model", "add_lora", "add_product", "base_shapes", "combined", "fingerprint", "freeze",
           "kernel_norms", "merge_lora", "new_factors", "split_factors", "split_trained", "with_magnitudes"]
