"""Checkpoints of every kind, in and out: Hugging Face, PEFT's adapters, and the workdirs of runs."""

from dlm_jax.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(__name__, {
    "drafter": ("DrafterSettings", "StoredDrafter", "open_drafter"),
    "drafter_layouts": ("save_drafter",),
    "hf_config": ("config_from_hf", "config_to_hf"),
    "hf_export": ("save_pretrained",),
    "lora": ("LoRASettings", "resolve_lora"),
    "pretrained": ("Pretrained", "load_pretrained"),
    "source": ("is_workdir",),
})
