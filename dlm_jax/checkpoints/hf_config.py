"""config.json to and from ModelConfig and DiffusionSpec.

A setting that changes the computation is either expressed in ModelConfig or refused; all others are kept for export.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dlm_jax.checkpoints import hf_gemma, hf_moe
from dlm_jax.checkpoints.hf_config_diffusion import (
    DIFFUSION_FAMILIES,
    blocks_to_record,
    check_plain,
    rewrite_config,
)
from dlm_jax.checkpoints.hf_rope import partial_rotary_factor, rope_from_hf, rope_to_hf
from dlm_jax.checkpoints.settings import check_implemented, require
from dlm_jax.diffusion import BlockSpec, DiffusionSpec
from dlm_jax.errors import CheckpointError
from dlm_jax.models import ModelConfig
from dlm_jax.storage import read_json

# Settings that HF's code implements and this library does not, with the values that have no effect.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "quantization_config": (None,), "compression_config": (None,),
}
# Settings that transformers takes as they are, never as text: "false" would count as true.
_FLAGS = ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window", "use_qkv_bias", "norm_topk_prob")
_NUMBERS = ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps", "initializer_range", "rope_theta",
            "max_window_layers", "rope_local_base_freq", "router_aux_loss_coef")
_SIZES_OR_NULL = ("head_dim", "n_inner", "sliding_window")

# Other names of GPT-2's sizes, which transformers prefers (its `attribute_map`).
_GPT2_ALIASES = {"n_embd": "hidden_size", "n_positions": "max_position_embeddings", "n_head": "num_attention_heads",
                 "n_layer": "num_hidden_layers"}

_ARCHITECTURES = {
    "gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "stablelm": "StableLmForCausalLM",
    "gemma2": "Gemma2ForCausalLM", "gemma3_text": "Gemma3ForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM",
}  # fmt: skip
_ACTIVATIONS = {
    "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh",
    "gelu": "gelu", "silu": "silu", "swish": "silu", "relu": "relu",
}  # fmt: skip
_HF_ACTIVATIONS = {"gelu_tanh": "gelu_new", "gelu": "gelu", "silu": "silu", "relu": "relu"}

# Keys of the source's config.json that an export does not keep: it writes its own, in one spelling.
_REWRITTEN = ("rope_parameters", "rope_scaling", "rope_theta", "rope_local_base_freq", "partial_rotary_factor",
              "layer_types", "sliding_window_pattern", "_sliding_window_pattern", "dtype",
              "torch_dtype", "auto_map", "_name_or_path", "transformers_version", "mask_token_id", "dlm_jax",
              *_GPT2_ALIASES.values())


def read_config(directory: Path) -> dict[str, Any]:
    """Reads a checkpoint directory's config.json; one of another project's diffusion models is rewritten as an export.

    Raises:
      CheckpointError: the file is missing or damaged, or says that code which this library lacks computes the model.
    """
    path = directory / "config.json"
    if not path.is_file():
        inner = sorted(file.parent.name for kind in ("config.json", "adapter_config.json")
                       for file in directory.glob(f"*/{kind}"))
        hint = f"; give one of the folders in it ({', '.join(dict.fromkeys(inner))})" if inner else ""
        if files := sorted(file.name for file in directory.glob("*.gguf")):
            hint = f"; give a GGUF file in it ({', '.join(files)})"
        raise CheckpointError(f"{directory} has no config.json, so it is not a Hugging Face checkpoint{hint}")
    hf = hf_moe.with_own_type(hf_gemma.text_model(read_json(path)))
    if hf.get("model_type") in _ARCHITECTURES:
        check_plain(hf)
    return rewrite_config(hf, directory)


def recorded_diffusion(hf: Mapping[str, Any]) -> DiffusionSpec:
    """Returns what a config records of diffusion; an AR model's config gives no mask token, the shift and no blocks."""
    record = hf.get("dlm_jax") or {}
    return DiffusionSpec(record.get("mask_token_id", hf.get("mask_token_id")), record.get("shift", True),
                         blocks_from_record(record))


def blocks_from_record(record: Mapping[str, Any]) -> BlockSpec | None:
    """Inverts `blocks_to_record`."""
    size = record.get("block_size")
    if size is None:
        return None
    return BlockSpec(size, record.get("clean_attention", "causal"), record.get("noise", "mask"),
                     record.get("noised_attention", "bidirectional"))


def recorded_sampling(hf: Mapping[str, Any], diffusion: DiffusionSpec) -> dict[str, Any]:
    """Returns the settings of `sampling.SamplerConfig` that a config records as the model's own defaults.

    They are those of one way to generate: a model that has learned another one, as `diffusion` says, has none.
    """
    record = recorded_diffusion(hf)
    if (diffusion.shift, diffusion.blocks) != (record.shift, record.blocks):
        return {}
    return dict((hf.get("dlm_jax") or {}).get("sampling") or {})


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """Returns the architecture that a config.json describes, with HF's defaults for absent keys.

    Raises:
      CheckpointError: a family or setting that this library does not implement, or a missing size.
    """
    family = hf.get("model_type")
    if family not in _ARCHITECTURES:
        raise CheckpointError(f"config.json has model_type {family!r}; supported are "
                              f"{', '.join([*_ARCHITECTURES, *DIFFUSION_FAMILIES])}")
    check_implemented(hf, _NEUTRAL)
    for names, kind in ((_FLAGS, "true or false"), (_NUMBERS, "a number")):
        for name in names:
            if name in hf:
                require(hf[name], name, kind)
    for name in _SIZES_OR_NULL:
        if hf.get(name) is not None:
            _size(hf, name)
    if family in hf_gemma.FAMILIES:
        hf = hf_gemma.with_defaults(hf)
        return dataclasses.replace(_from_llama(hf, family), **hf_gemma.fields(hf))
    if family in hf_moe.FAMILIES:
        found = hf_moe.fields(hf)
        return dataclasses.replace(_from_llama(hf | {"intermediate_size": found["mlp_size"]}, family), **found)
    read = {"gpt2": _from_gpt2, "stablelm": _from_stablelm}.get(family)
    return _from_llama(hf, family) if read is None else read(hf)


def config_to_hf(config: ModelConfig, base: Mapping[str, Any], diffusion: DiffusionSpec,
                 dtype: str) -> dict[str, Any]:
    """Returns a config.json for an architecture.

    Args:
      base: the config.json that the model came from; keys that this function does not write are kept.
      diffusion: recorded if it has a mask token.
      dtype: of the stored weights.

    Raises:
      CheckpointError: the family's HF class cannot express this architecture.
    """
    kept = {name: value for name, value in base.items() if name not in _REWRITTEN}
    hf = kept | (_to_gpt2(config) if config.family == "gpt2" else _to_llama(config)) | {
        "model_type": config.family,
        "architectures": [_ARCHITECTURES[config.family]],
        "vocab_size": config.vocab_size,
        "initializer_range": config.initializer_range,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": dtype,
    }
    if diffusion.mask_token_id is not None:
        hf["mask_token_id"] = diffusion.mask_token_id
        hf["dlm_jax"] = {"mask_token_id": diffusion.mask_token_id, "shift": diffusion.shift}
        if diffusion.blocks is not None:
            hf["dlm_jax"] |= blocks_to_record(diffusion.blocks)
        if sampling := recorded_sampling(base, diffusion):
            hf["dlm_jax"]["sampling"] = sampling
    expected, read_back = dataclasses.asdict(config), dataclasses.asdict(config_from_hf(hf))
    lost = [name for name in expected if read_back[name] != expected[name] and not name.endswith("_dropout")]
    if lost:
        raise CheckpointError(f"the Hugging Face class of {config.family} cannot express this model's "
                              f"{', '.join(lost)}")
    return hf


def _from_gpt2(hf: Mapping[str, Any]) -> ModelConfig:
    hf = {**hf, **{name: hf[alias] for name, alias in _GPT2_ALIASES.items() if alias in hf}}
    hidden, heads = _size(hf, "n_embd"), _size(hf, "n_head")
    return ModelConfig(
        family="gpt2", vocab_size=_size(hf, "vocab_size"), hidden_size=hidden, num_layers=_size(hf, "n_layer"),
        num_heads=heads, num_kv_heads=heads, head_dim=_head_dim(hf, hidden, heads),
        mlp_size=hf.get("n_inner") or 4 * hidden, max_length=_size(hf, "n_positions"),
        norm="layer", norm_eps=hf.get("layer_norm_epsilon", 1e-5),
        activation=_activation(hf.get("activation_function", "gelu_new")), gated_mlp=False, positions="learned",
        qkv_bias=True, out_bias=True, mlp_bias=True, tie_embeddings=hf.get("tie_word_embeddings", True),
        embed_dropout=hf.get("embd_pdrop", 0.1), attention_dropout=hf.get("attn_pdrop", 0.1),
        residual_dropout=hf.get("resid_pdrop", 0.1), initializer_range=hf.get("initializer_range", 0.02),
    )  # fmt: skip


def _to_gpt2(config: ModelConfig) -> dict[str, Any]:
    return {
        "n_embd": config.hidden_size, "n_layer": config.num_layers, "n_head": config.num_heads,
        "n_inner": config.mlp_size, "n_positions": config.max_length, "n_ctx": config.max_length,
        "layer_norm_epsilon": config.norm_eps, "activation_function": _HF_ACTIVATIONS[config.activation],
        "embd_pdrop": config.embed_dropout, "attn_pdrop": config.attention_dropout,
        "resid_pdrop": config.residual_dropout,
    }  # fmt: skip


def _from_llama(hf: Mapping[str, Any], family: str) -> ModelConfig:
    hidden, heads = _size(hf, "hidden_size"), _size(hf, "num_attention_heads")
    absent = None if family == "llama" else 0  # null, and for LLaMA also no key, means as many as heads
    kv_heads = heads if hf.get("num_key_value_heads", absent) is None else _size(hf, "num_key_value_heads")
    attention_bias = family in ("llama", "qwen3", "qwen3_moe", *hf_gemma.FAMILIES) and hf.get("attention_bias", False)
    theta, scaling = rope_from_hf(hf)
    rotary = partial_rotary_factor(hf)
    if rotary != 1 and family != "stablelm":
        raise CheckpointError(f"config.json sets partial_rotary_factor to {rotary}, which the Hugging Face class of "
                              f"{family} does not implement")
    window, full_attention_layers = _sliding_window(hf, family)
    return ModelConfig(
        family=family, vocab_size=_size(hf, "vocab_size"), hidden_size=hidden,
        num_layers=_size(hf, "num_hidden_layers"), num_heads=heads, num_kv_heads=kv_heads,
        head_dim=hf.get("head_dim", 128 if family == "qwen3" else None) or _head_dim(hf, hidden, heads),
        mlp_size=_size(hf, "intermediate_size"), max_length=_size(hf, "max_position_embeddings"),
        norm="rms", norm_eps=hf.get("rms_norm_eps", 1e-6), activation=_activation(hf.get("hidden_act", "silu")),
        gated_mlp=True, positions="rope", rope_theta=theta, rope_scaling=scaling, partial_rotary_factor=rotary,
        qkv_bias=family == "qwen2" or attention_bias, out_bias=attention_bias,
        mlp_bias=family == "llama" and hf.get("mlp_bias", False),
        qk_norm=family in ("qwen3", "qwen3_moe", "gemma3_text"),
        tie_embeddings=hf.get("tie_word_embeddings", False), sliding_window=window,
        full_attention_layers=full_attention_layers, attention_dropout=hf.get("attention_dropout", 0.0),
        initializer_range=hf.get("initializer_range", 0.02),
    )  # fmt: skip


def _from_stablelm(hf: Mapping[str, Any]) -> ModelConfig:
    check_implemented(hf, {"use_parallel_residual": (False,), "qk_layernorm": (False,)})
    defaults = {"num_key_value_heads": 32}
    if not any("partial_rotary_factor" in (hf.get(name) or {}) for name in ("rope_scaling", "rope_parameters")):
        defaults["partial_rotary_factor"] = 0.25
    hf = defaults | {name: value for name, value in hf.items() if name != "head_dim"}
    return dataclasses.replace(
        _from_llama(hf, "stablelm"), norm="layer", norm_eps=hf.get("layer_norm_eps", 1e-5),
        qkv_bias=hf.get("use_qkv_bias", False), residual_dropout=hf.get("hidden_dropout", 0.0))


def _to_llama(config: ModelConfig) -> dict[str, Any]:
    window = config.sliding_window
    hf = {
        "hidden_size": config.hidden_size, "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads, "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim, "intermediate_size": config.mlp_size,
        "max_position_embeddings": config.max_length, "rms_norm_eps": config.norm_eps,
        "hidden_act": _HF_ACTIVATIONS[config.activation], "attention_dropout": config.attention_dropout,
        "rope_theta": config.rope_theta, "rope_scaling": rope_to_hf(config.rope_scaling),
    }  # fmt: skip
    if config.family in ("llama", "qwen3", "qwen3_moe"):
        hf["attention_bias"] = config.out_bias
    if config.family == "llama":
        hf["mlp_bias"] = config.mlp_bias
    if config.family == "stablelm":
        hf |= {"layer_norm_eps": config.norm_eps, "use_qkv_bias": config.qkv_bias,
               "partial_rotary_factor": config.partial_rotary_factor, "hidden_dropout": config.residual_dropout}
    if config.family == "mistral":
        hf["sliding_window"] = window
    if config.family in ("qwen2", "qwen3"):
        hf |= {"use_sliding_window": window is not None, "sliding_window": window,
               "max_window_layers": 0 if window else config.num_layers}
        if config.full_attention_layers:
            hf["layer_types"] = ["full_attention" if layer in config.full_attention_layers else "sliding_attention"
                                 for layer in range(config.num_layers)]
    if config.family in hf_moe.FAMILIES:
        hf |= hf_moe.to_hf(config) | {"use_sliding_window": window is not None, "sliding_window": window}
    if config.family in hf_gemma.FAMILIES:
        del hf["hidden_act"]
        hf |= hf_gemma.to_hf(config)
    return hf


def _size(hf: Mapping[str, Any], name: str) -> int:
    return require(hf.get(name), name, "a positive integer")


def _head_dim(hf: Mapping[str, Any], hidden: int, heads: int) -> int:
    if hidden % heads:
        raise CheckpointError(f"config.json has a hidden size of {hidden}, not a multiple of its {heads} heads")
    return hidden // heads


def _activation(name: str) -> str:
    if name not in _ACTIVATIONS:
        raise CheckpointError(f"config.json names the activation {name!r}; known are {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def _sliding_window(hf: Mapping[str, Any], family: str) -> tuple[int | None, tuple[int, ...]]:
    """Returns the sliding window, None if no layer has one, and the layers that see the full text although others do
    not."""
    if family in ("llama", "stablelm"):
        return None, ()
    window, layers = hf.get("sliding_window", 4096), _size(hf, "num_hidden_layers")
    if family == "mistral":
        return window, ()
    if family in ("qwen2", "qwen3", "qwen3_moe") and not hf.get("use_sliding_window", False):
        window = None
    full = layers if window is None else min(hf.get("max_window_layers", 28), layers)
    kinds = hf.get("layer_types") or ["full_attention"] * full + ["sliding_attention"] * (layers - full)
    if len(kinds) != layers or not set(kinds) <= {"full_attention", "sliding_attention"}:
        raise CheckpointError(f"config.json gives {len(kinds)} layer_types ({', '.join(sorted(set(kinds)))}) for "
                              f"{layers} layers; known are full_attention and sliding_attention")
    full_layers = tuple(layer for layer, kind in enumerate(kinds) if kind == "full_attention")
    if len(full_layers) == layers:
        return None, ()
    if window is None:
        raise CheckpointError("config.json has layer_types with sliding_attention and no window for it "
                              "(use_sliding_window, sliding_window)")
    return window, full_layers
