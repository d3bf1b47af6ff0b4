"""The network: its architecture, layers, cache and LoRA, and drafters on its hidden states."""

from dlm_jax.models.config import Compute, ExpertsConfig, ModelConfig, RopeScaling
from dlm_jax.models.drafter import DraftedModel, Drafter, DrafterConfig, abstract_drafter, spread_layer_ids
from dlm_jax.models.layers import Cache, LMHead
from dlm_jax.models.lora import LoRAConfig, LoRAFactor, LoRAParam
from dlm_jax.models.lora_ops import (
    add_dora_magnitudes,
    add_lora,
    base_shapes,
    combine_fingerprints,
    fingerprint,
    freeze_base,
    init_lora_factors,
    kernel_norms,
    merge_kernel,
    merge_lora,
    split_lora,
    split_trainable,
)
from dlm_jax.models.transformer import LayerVisitor, Transformer, abstract_model

__all__ = ["Cache", "Compute", "DraftedModel", "Drafter", "DrafterConfig", "ExpertsConfig", "LMHead", "LayerVisitor",
           "LoRAConfig", "LoRAFactor", "LoRAParam", "ModelConfig", "RopeScaling", "Transformer", "abstract_drafter",
           "abstract_model", "add_dora_magnitudes", "add_lora", "base_shapes", "combine_fingerprints", "fingerprint",
           "freeze_base", "init_lora_factors", "kernel_norms", "merge_kernel", "merge_lora", "split_lora",
           "split_trainable", "spread_layer_ids"]
