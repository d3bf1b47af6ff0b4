"""Hugging Face checkpoints, configurations and tokenizers, in and out."""

from dlm_jax.checkpoints.hf_config import config_from_hf, config_to_hf
from dlm_jax.checkpoints.hf_export import save_pretrained
from dlm_jax.checkpoints.hf_import import load_pretrained
from dlm_jax.checkpoints.pretrained import Pretrained

__all__ = ["Pretrained", "config_from_hf", "config_to_hf", "load_pretrained", "save_pretrained"]
