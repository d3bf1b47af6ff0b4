"""Checkpoints of every kind, in and out: Hugging Face, PEFT's adapters, and the workdirs of runs."""

from dlm_jax.checkpoints.hf_config import config_from_hf, config_to_hf
from dlm_jax.checkpoints.hf_export import save_pretrained
from dlm_jax.checkpoints.lora import LoRASettings, resolve_lora
from dlm_jax.checkpoints.pretrained import Pretrained, load_pretrained
from dlm_jax.checkpoints.workdir import is_workdir

__all__ = ["LoRASettings", "Pretrained", "config_from_hf", "config_to_hf", "is_workdir", "load_pretrained",
           "resolve_lora", "save_pretrained"]
