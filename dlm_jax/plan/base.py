"""The base model as far as planning needs it: its architecture and mask token, without weights."""

import dataclasses
from pathlib import Path
from typing import Any

from dlm_jax.checkpoints import config_from_hf, load_pretrained
from dlm_jax.checkpoints.tokenizer import choose_mask_token
from dlm_jax.errors import ConfigError
from dlm_jax.models import ModelConfig
from dlm_jax.training.config import ModelSource
from dlm_jax.training.setup import with_dropout

_GPT2 = {"model_type": "gpt2", "vocab_size": 50257, "n_positions": 1024}
_LLAMA = {"model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5}

# config.json of models on the hub, so that they can be planned for without a network, and before their terms are
# accepted: the values that describe the architecture.
KNOWN: dict[str, dict[str, Any]] = {
    "gpt2": _GPT2 | {"n_embd": 768, "n_layer": 12, "n_head": 12},
    "gpt2-medium": _GPT2 | {"n_embd": 1024, "n_layer": 24, "n_head": 16},
    "gpt2-large": _GPT2 | {"n_embd": 1280, "n_layer": 36, "n_head": 20},
    "meta-llama/Llama-2-7b-hf": _LLAMA | {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096,
        "tie_word_embeddings": False},
    "meta-llama/Llama-3.2-1B": _LLAMA | {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 131072,
        "rope_theta": 500000.0, "tie_word_embeddings": True,
        "rope_scaling": {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 8192}},
    "Qwen/Qwen3-0.6B": {
        "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072,
        "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
        "max_position_embeddings": 40960, "rope_theta": 1000000.0, "rms_norm_eps": 1e-6, "hidden_act": "silu",
        "tie_word_embeddings": True},
}  # fmt: skip
KNOWN["diffusionfamily/diffullama"] = KNOWN["meta-llama/Llama-2-7b-hf"]
KNOWN["Qwen/Qwen3-0.6B-Base"] = KNOWN["Qwen/Qwen3-0.6B"] | {"max_position_embeddings": 32768}


@dataclasses.dataclass(frozen=True)
class Base:
    """A model to start from.

    Attributes:
      config: its architecture, with the row that a new mask token adds to the vocabulary.
      origin: in words, where the architecture was read.
      new_mask_token: whether that row is new.
    """

    config: ModelConfig
    mask_token_id: int | None
    source: str
    origin: str
    new_mask_token: bool = False


def describe_base(model: ModelSource) -> Base:
    """Describes `model.source`: a known id by the table, everything else by its config.json.

    A mask token given as text is new if there is no tokenizer to look it up.

    Raises:
      ConfigError: no source is named.
      CheckpointError: it cannot be found or read, or the mask token is outside its vocabulary.
    """
    if not model.source:
        raise ConfigError("model.source names no base model; give a directory, a hub id, or a workdir[@step]")
    if model.source in KNOWN and not Path(model.source).is_dir():
        config, is_new = config_from_hf(KNOWN[model.source]), isinstance(model.mask_token, str)
        mask_token_id = config.vocab_size
        if not is_new:
            mask_token_id, _ = choose_mask_token(model.mask_token, None, config.vocab_size, None)
        config = dataclasses.replace(config, vocab_size=config.vocab_size + is_new)
        origin = "the table of known models in dlm_jax"
    else:
        base = load_pretrained(model.source, init="abstract", mask_token=model.mask_token)
        config, mask_token_id, is_new = base.model.config, base.mask_token_id, base.new_mask_token
        origin = f"config.json of {model.source}"
    return Base(with_dropout(config, model.dropout), mask_token_id, model.source, origin, is_new)
