"""A GGUF file as a stored model: its metadata as a config.json, its tensors by HF's names.

llama.cpp's converter renames tensors, transposes GPT-2's kernels, joins the experts of a layer, and reorders the rows
of LLaMA's queries and keys for its own layout of RoPE. All of this is undone here, tensor by tensor, when it is read.
What the metadata ask for is expressed as HF would, so that `hf_config` decides what is computed and what is refused;
the rest is refused here.
"""

import dataclasses
import functools
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dlm_jax.checkpoints import hf_gemma, hf_moe
from dlm_jax.checkpoints.gguf_file import GGUFContent, GGUFTensor, check_types, read_gguf
from dlm_jax.checkpoints.gguf_tokenizer import build_tokenizer
from dlm_jax.checkpoints.hf_config import config_from_hf
from dlm_jax.checkpoints.hf_config_diffusion import DIFFUSION_FAMILIES
from dlm_jax.checkpoints.settings import check_implemented
from dlm_jax.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Keys after the architecture's name, and HF's. Mistral's files are of the architecture llama.
_LLAMA_KEYS = {
    "context_length": "max_position_embeddings", "embedding_length": "hidden_size", "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size", "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads", "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta", "attention.key_length": "head_dim",
}  # fmt: skip
_GPT2_KEYS = {
    "context_length": "n_positions", "embedding_length": "n_embd", "block_count": "n_layer",
    "feed_forward_length": "n_inner", "attention.head_count": "n_head",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
}  # fmt: skip
_GEMMA_KEYS = _LLAMA_KEYS | {
    "attention.sliding_window": "sliding_window", "rope.freq_base_swa": "rope_local_base_freq",
    "attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping",
}  # fmt: skip
_MOE_KEYS = _LLAMA_KEYS | {
    "expert_count": "num_experts", "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}  # fmt: skip
_KEYS = {"llama": _LLAMA_KEYS, "qwen2": _LLAMA_KEYS, "qwen3": _LLAMA_KEYS, "gpt2": _GPT2_KEYS, "gemma2": _GEMMA_KEYS,
         "gemma3": _GEMMA_KEYS, "dream": _LLAMA_KEYS, "llada": _LLAMA_KEYS, "qwen3moe": _MOE_KEYS, "rnd1": _MOE_KEYS,
         "llada-moe": _MOE_KEYS}
# HF's model_type where it is not the architecture's name.
_FAMILIES = {"gemma3": "gemma3_text", "dream": "qwen2", "llada": "llama", "qwen3moe": "qwen3_moe", "rnd1": "qwen3_moe",
             "llada-moe": "qwen3_moe"}
_DIFFUSION = {"dream": DIFFUSION_FAMILIES["Dream"], "llada": DIFFUSION_FAMILIES["llada"],
              "rnd1": DIFFUSION_FAMILIES["rnd1"], "llada-moe": DIFFUSION_FAMILIES["llada_moe"]}
# Whether the weights of a token's experts add up to 1, which llama.cpp has in its code, not in the file.
_NORMALIZES = {"qwen3moe": True, "rnd1": True, "llada-moe": False}

_WINDOWS = "attention.sliding_window_pattern"  # of each layer, or one of how many has none
# Layers of those Gemmas whose scores are divided by the root of width / heads, of which files say nothing. llama.cpp
# recognizes them so too.
_GEMMA_27B_LAYERS = {"gemma2": 46, "gemma3": 62}

# Settings that llama.cpp implements and this library does not, with the values that have no effect.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "expert_count": (0,), "attention.causal": (True,), "attention.sliding_window": (0,),
    "attention.clamp_kqv": (0.0,), "attention.max_alibi_bias": (0.0,), "attention.scale": (0.0,),
    "attention.temperature_scale": (0.0, 1.0), "attn_logit_softcapping": (0.0,), "final_logit_softcapping": (0.0,),
    "logit_scale": (0.0, 1.0), "residual_scale": (0.0, 1.0), "embedding_scale": (0.0, 1.0),
    "use_parallel_residual": (False,), "pooling_type": (0,), "expert_shared_count": (0,),
    "expert_shared_feed_forward_length": (0,), "expert_weights_scale": (0.0, 1.0), "expert_gating_func": (0, 1),
    "expert_group_count": (0, 1),
}  # fmt: skip

_LLAMA_NAMES = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
_GEMMA_NAMES = _LLAMA_NAMES | {
    "post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip
_GPT2_NAMES = {
    "token_embd": "transformer.wte", "position_embd": "transformer.wpe", "output_norm": "transformer.ln_f",
    "output": "lm_head", "attn_norm": "ln_1", "attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2", "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj",
}  # fmt: skip
_MOE_NAMES = _LLAMA_NAMES | {"ffn_gate_inp": "mlp.gate"}
_NAMES = {"gpt2": _GPT2_NAMES, "gemma2": _GEMMA_NAMES, "gemma3_text": _GEMMA_NAMES, "qwen3_moe": _MOE_NAMES}
# The matrices of all experts of a layer, one after another.
_EXPERTS = {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"}
_TENSOR = re.compile(r"(?:blk\.(?P<layer>\d+)\.)?(?P<part>\w+)\.(?P<kind>weight|bias)")

_ROPE_FACTORS = "rope_freqs.weight"  # by how much each frequency is divided
_HEAD, _EMBEDDING = "output.weight", "token_embd.weight"
# Of LLaMA 3.1 and its successors. The file has only what follows from them.
_LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


class GGUFModel:
    """A model in a file, with the names of `stored.HFDirectory`."""

    recipe = None

    def __init__(self, path: Path):
        self._content = read_gguf(path)

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        return read_config(self._content)

    @functools.cached_property
    def tokenizer(self) -> "PreTrainedTokenizerBase | None":
        return build_tokenizer(self._content.metadata, self._content.path)

    def tensors(self) -> dict[str, GGUFTensor]:
        return named_tensors(self._content, self.config)


def read_config(content: GGUFContent) -> dict[str, Any]:
    """Returns a file's metadata as a config.json.

    Raises:
      CheckpointError: the architecture or a setting is not implemented, or a size is missing.
    """
    path, metadata, tensors = content.path, content.metadata, content.tensors
    family = metadata.get("general.architecture")
    if family not in _KEYS:
        raise CheckpointError(f"{path} holds a model of the architecture {family}; those that can be computed are "
                              f"{', '.join(_KEYS)} (Mistral's files are of llama), so use a model of one of these")
    settings = {key.removeprefix(f"{family}."): value if key.endswith(_WINDOWS) else _one_for_all(path, key, value)
                for key, value in metadata.items() if key.startswith(f"{family}.")}
    read = {*_KEYS[family], *(["attention.causal"] if family in _DIFFUSION else [])}
    check_implemented({f"{family}.{name}": value for name, value in settings.items()},
                      {f"{family}.{name}": allowed for name, allowed in _NEUTRAL.items() if name not in read},
                      path, "; use a model without it")
    if _EMBEDDING not in tensors:
        raise CheckpointError(f"{path} lacks the tensor {_EMBEDDING}, so it holds no language model")
    config = {name: _decimal(settings[key]) for key, name in _KEYS[family].items() if key in settings}
    config |= {"model_type": _FAMILIES.get(family, family), "vocab_size": tensors[_EMBEDDING].shape[0],
               "tie_word_embeddings": _is_tied(tensors)}
    if family != "gpt2":
        config |= _llama_settings(path, config["model_type"], settings, config, tensors)
    if family in _GEMMA_27B_LAYERS:
        config |= _gemma_settings(family, settings, config)
    if family in _NORMALIZES:
        config["norm_topk_prob"] = _NORMALIZES[family]
    if family in _DIFFUSION:
        config["dlm_jax"] = {
            "mask_token_id": metadata.get("tokenizer.ggml.mask_token_id", _DIFFUSION[family].mask_token_id),
            "shift": metadata.get("diffusion.shift_logits", True), "sampling": dict(_DIFFUSION[family].sampling)}
    for name in ("bos", "eos"):
        if (token := metadata.get(f"tokenizer.ggml.{name}_token_id")) is not None:
            config[f"{name}_token_id"] = token
    try:
        config_from_hf(config)
    except (CheckpointError, ConfigError) as error:
        raise CheckpointError(f"{path}, read as a Hugging Face checkpoint, is refused: {error}") from error
    return config


def named_tensors(content: GGUFContent, config: dict[str, Any]) -> dict[str, GGUFTensor]:
    """Returns a file's tensors by HF's names and as HF stores them, dequantized when they are used.

    Args:
      config: from `read_config`.

    Raises:
      CheckpointError: a tensor has a name that this architecture does not have, or a type that cannot be read.
    """
    check_types(content)
    family = config["model_type"]
    names, tensors, unknown = _NAMES.get(family, _LLAMA_NAMES), {}, []
    for name, tensor in content.tensors.items():
        if name == _ROPE_FACTORS or (name == _HEAD and config["tie_word_embeddings"]):
            continue
        found = _TENSOR.fullmatch(name)
        if found is None or not (found["part"] in names or _is_joined(found["part"], tensor, family)):
            unknown.append(name)
            continue
        layers = "transformer.h" if family == "gpt2" else "model.layers"
        prefix = "" if found["layer"] is None else f"{layers}.{found['layer']}."
        if found["part"] not in names:
            tensors |= _split_experts(tensor, f"{prefix}mlp.experts", _EXPERTS[found["part"]])
            continue
        tensors[f"{prefix}{names[found['part']]}.{found['kind']}"] = _as_hf(tensor, found["part"], family, config)
    if unknown:
        raise CheckpointError(f"{content.path} has tensors that a {family} here does not have: "
                              f"{', '.join(sorted(unknown)[:3])}; it is a variant that this library does not implement")
    return tensors


def _as_hf(tensor: GGUFTensor, part: str, family: str, config: dict[str, Any]) -> GGUFTensor:
    """Returns a tensor that dequantizes to HF's layout."""
    if family == "gpt2" and len(tensor.shape) == 2 and part not in ("token_embd", "position_embd", "output"):
        return dataclasses.replace(tensor, shape=tensor.shape[::-1], convert=np.transpose)
    if family == "llama" and part in ("attn_q", "attn_k"):
        heads = config["num_attention_heads"]
        heads = heads if part == "attn_q" else config.get("num_key_value_heads", heads)
        if tensor.shape[0] % (2 * heads) == 0:  # any other shape is refused with all others
            return dataclasses.replace(tensor, convert=functools.partial(_split_rotary, heads=heads))
    if part.endswith("norm") and family in hf_gemma.FAMILIES:  # a file has what is multiplied, HF that less 1
        return dataclasses.replace(tensor, convert=lambda scale: scale - 1)
    return tensor


def _is_joined(part: str, tensor: GGUFTensor, family: str) -> bool:
    return family in hf_moe.FAMILIES and part in _EXPERTS and len(tensor.shape) == 3


def _split_experts(tensor: GGUFTensor, prefix: str, name: str) -> dict[str, GGUFTensor]:
    """Returns the matrix of each expert by its HF name."""
    return {f"{prefix}.{expert}.{name}.weight": dataclasses.replace(tensor, shape=tensor.shape[1:], stored=stored)
            for expert, stored in enumerate(tensor.stored)}


def _split_rotary(rows: np.ndarray, heads: int) -> np.ndarray:
    """Returns the rows of each head with all first elements of RoPE's pairs before all second ones."""
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return np.swapaxes(pairs, 1, 2).reshape(rows.shape)


def _llama_settings(path: Path, family: str, settings: dict[str, Any], config: dict[str, Any],
                    tensors: dict[str, GGUFTensor]) -> dict[str, Any]:
    """Returns what else config.json has for a LLaMA and its relatives."""
    heads = config.get("num_attention_heads")
    if not heads or not config.get("hidden_size"):
        return {}  # `config_from_hf` names what is missing
    head_dim = config.get("head_dim", config["hidden_size"] // heads)
    if settings.get("attention.value_length", head_dim) != head_dim:
        raise CheckpointError(f"{path} has keys of {head_dim} dimensions and values of "
                              f"{settings['attention.value_length']}, which this library does not implement")
    more = {"head_dim": head_dim, "num_key_value_heads": config.get("num_key_value_heads", heads)}
    if family != "qwen2":
        more["attention_bias"] = "blk.0.attn_q.bias" in tensors
    if family == "llama":
        more["mlp_bias"] = "blk.0.ffn_up.bias" in tensors
    if (rotary := settings.get("rope.dimension_count", head_dim)) != head_dim:
        more["partial_rotary_factor"] = rotary / head_dim
    kind = settings.get("rope.scaling.type", "linear" if "rope.scale_linear" in settings else "none")
    if kind not in ("none", "linear"):
        more["rope_scaling"] = {"rope_type": kind}
    elif kind == "linear":
        factor = settings.get("rope.scaling.factor", settings.get("rope.scale_linear"))
        more["rope_scaling"] = {"rope_type": kind, "factor": factor}
    if _ROPE_FACTORS in tensors:
        original = settings.get("rope.scaling.original_context_length", 8192)
        theta = config.get("rope_theta", 10000.0)
        more["rope_scaling"] = _llama3_scaling(path, np.asarray(tensors[_ROPE_FACTORS]), theta, original)
    return more


def _gemma_settings(family: str, settings: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Returns what config.json of a Gemma has beyond a LLaMA's."""
    more = {}
    if config.get("num_hidden_layers") == _GEMMA_27B_LAYERS[family] and config.get("num_attention_heads"):
        more["query_pre_attn_scalar"] = config["hidden_size"] // config["num_attention_heads"]
    else:
        more["query_pre_attn_scalar"] = config.get("head_dim", 256)
    windows = settings.get(_WINDOWS)
    if isinstance(windows, list):
        more["layer_types"] = ["sliding_attention" if slides else "full_attention" for slides in windows]
    elif windows is not None:
        more["sliding_window_pattern"] = windows
    return more


def _llama3_scaling(path: Path, factors: np.ndarray, theta: float, original: int) -> dict[str, Any]:
    """Returns the scaling of LLaMA 3 that divides RoPE's frequencies by these factors.

    Raises:
      CheckpointError: no such scaling does.
    """
    scaling = {"rope_type": "llama3", "factor": float(factors.max())} | _LLAMA3_ROPE
    scaling["original_max_position_embeddings"] = original
    frequencies = theta ** (-np.arange(len(factors)) / len(factors))
    turns = original * frequencies / (2 * np.pi)  # over the original length
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    share = np.clip((turns - low) / (high - low), 0, 1)
    expected = 1 / (share + (1 - share) / scaling["factor"])
    if not np.allclose(factors, expected, rtol=1e-3):
        raise CheckpointError(f"{path} scales RoPE by {_ROPE_FACTORS}, whose factors are not those of LLaMA 3; this "
                              "library does not implement others")
    return scaling


def _one_for_all(path: Path, key: str, value: Any) -> Any:
    """Returns the value of a setting that may be given layer by layer, if it is the same for all layers."""
    if not isinstance(value, list) or not value:
        return value
    if any(item != value[0] for item in value):
        raise CheckpointError(f"{path} gives {key} of its own to each layer, which this library does not implement")
    return value[0]


def _decimal(value: Any) -> Any:
    """Returns a float32 as the decimal number that it was rounded from: 1e-05 instead of 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _is_tied(tensors: dict[str, GGUFTensor]) -> bool:
    """Returns whether the head is the embedding: it is absent, or the same bytes."""
    if _HEAD not in tensors:
        return True
    head, embedding = tensors[_HEAD], tensors[_EMBEDDING]
    return head.kind == embedding.kind and np.array_equal(head.stored, embedding.stored)
