"""Hugging Face checkpoints, configurations and tokenizers, in and out."""

from dlm_jax.hf.config import config_from_hf, config_to_hf
from dlm_jax.hf.export import save_pretrained
from dlm_jax.hf.load import Pretrained, load_pretrained

__all__ = ["Pretrained", "config_from_hf", "config_to_hf", "load_pretrained", "save_pretrained"]
