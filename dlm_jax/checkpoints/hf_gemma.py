"""What the config.json of Gemma 2 and 3 has beyond a LLaMA's: its own defaults, layers of two types, soft caps.

`with_defaults` spells the settings as LLaMA's relatives do, so that `hf_config` reads them; `fields` and `to_hf` are
the rest, in both directions. Defaults are those of transformers (`Gemma2Config`, `Gemma3TextConfig`).
"""

from collections.abc import Mapping
from typing import Any

from dlm_jax.checkpoints.settings import require
from dlm_jax.errors import CheckpointError
from dlm_jax.models import ModelConfig

FAMILIES = ("gemma2", "gemma3_text")

_DEFAULTS = {
    "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 256, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
    "sliding_window": 4096, "query_pre_attn_scalar": 256, "hidden_activation": "gelu_pytorch_tanh",
    "attn_logit_softcapping": None, "final_logit_softcapping": None,
}  # fmt: skip
_DEFAULTS_OF = {
    "gemma2": {"vocab_size": 256000, "max_position_embeddings": 8192, "attn_logit_softcapping": 50.0,
               "final_logit_softcapping": 30.0, "rope_theta": 10000.0},
    "gemma3_text": {"vocab_size": 262208, "max_position_embeddings": 131072, "rope_theta": 1e6,
                    "rope_local_base_freq": 1e4},
}
_SOFTCAPS = {"attn_logit_softcapping": "attention_softcap", "final_logit_softcapping": "logit_softcap"}
_FULL, _SLIDING = "full_attention", "sliding_attention"

# Of the config.json of a model that also reads images.
_OUTER = ("bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype", "tie_word_embeddings")


def text_model(hf: dict[str, Any]) -> dict[str, Any]:
    """Returns the config.json of the language model in a Gemma 3 that also reads images; any other as it is.

    Raises:
      CheckpointError: it has no text_config.
    """
    if hf.get("model_type") != "gemma3":
        return hf
    text = require(hf.get("text_config"), "text_config", "an object", "config.json of a gemma3")
    outer = {name: hf[name] for name in _OUTER if name in hf}
    return text | outer | {"model_type": "gemma3_text"}


def with_defaults(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a Gemma's settings with defaults for absent keys, in the spelling of LLaMA's relatives.

    Raises:
      CheckpointError: a setting that this library does not implement.
    """
    family = hf["model_type"]
    if hf.get("use_bidirectional_attention"):
        raise CheckpointError("config.json sets use_bidirectional_attention, so it is an encoder of texts and no "
                              "language model; use a Gemma that writes text")
    full = _DEFAULTS | _DEFAULTS_OF[family] | dict(hf)
    layers = full["num_hidden_layers"]
    if full.get("layer_types") is None and isinstance(layers, int):
        pattern = full.get("sliding_window_pattern", 6) if family == "gemma3_text" else 2
        require(pattern, "sliding_window_pattern", "a positive integer")
        full["layer_types"] = [_SLIDING if (layer + 1) % pattern else _FULL for layer in range(layers)]
    if family == "gemma3_text":
        full |= _two_ropes(full)
    return full | {"hidden_act": full["hidden_activation"]}


def fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of ModelConfig that LLaMA's relatives leave at their defaults.

    Args:
      hf: from `with_defaults`.
    """
    caps = {ours: hf[name] for name, ours in _SOFTCAPS.items()}
    for name in ("query_pre_attn_scalar", *_SOFTCAPS):
        if hf[name] is not None or name not in _SOFTCAPS:
            require(hf[name], name, "a positive number")
    # A scalar that is the head's dimension changes nothing.
    scalar = hf["query_pre_attn_scalar"]
    found = caps | {"norm": "zero_centered_rms", "post_norms": True, "scale_embeddings": True,
                    "query_pre_attn_scalar": None if scalar == hf["head_dim"] else scalar}
    if hf["model_type"] == "gemma3_text":
        found["sliding_rope_theta"] = hf["rope_local_base_freq"]
    return found


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Returns the keys of a Gemma's config.json that differ from a LLaMA's, in the spelling of transformers 4 and 5."""
    sliding = config.sliding_layers
    hf = {
        "hidden_activation": "gelu_pytorch_tanh" if config.activation == "gelu_tanh" else config.activation,
        "query_pre_attn_scalar": config.query_pre_attn_scalar or config.head_dim,
        "sliding_window": config.sliding_window,
        "layer_types": [_SLIDING if layer in sliding else _FULL for layer in range(config.num_layers)],
        "attention_bias": config.out_bias,
        **{name: getattr(config, ours) for name, ours in _SOFTCAPS.items()},
    }
    if config.family == "gemma3_text" and config.sliding_rope_theta is not None:
        hf["rope_local_base_freq"] = config.sliding_rope_theta
    return hf


def _two_ropes(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Returns RoPE's settings with those of full layers in the keys of transformers 4."""
    both = hf.get("rope_parameters")
    if both is None:
        return {}
    if not isinstance(both, dict) or not all(isinstance(both.get(kind) or {}, dict) for kind in (_FULL, _SLIDING)):
        raise CheckpointError(f"config.json must give rope_parameters as objects by the type of layer, not {both!r}")
    full, sliding = dict(both.get(_FULL) or {}), dict(both.get(_SLIDING) or {})
    if sliding.get("rope_type", "default") != "default":
        raise CheckpointError("config.json scales RoPE in layers with a sliding window, which this library does not "
                              "implement")
    theta = full.pop("rope_theta", hf["rope_theta"])
    scaling = full if full.get("rope_type", "default") != "default" else None
    return {"rope_parameters": None, "rope_theta": theta, "rope_scaling": hf.get("rope_scaling") or scaling,
            "rope_local_base_freq": sliding.get("rope_theta", hf["rope_local_base_freq"])}
