"""Writes tiny models of transformers as GGUF files, as llama.cpp's converter does."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers

KINDS = gguf.GGMLQuantizationType
_PER_BLOCK = {KINDS.Q6_K: [208], KINDS.Q4_K: [0, 2]}  # where a block of a k-quant has its float16 scales

_SIZES = dict(vocab_size=97, hidden_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
              intermediate_size=256, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=None)
_LLAMA3_ROPE = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, rope_theta=500000.0,
                    original_max_position_embeddings=8192)
_GEMMA = dict(head_dim=256, query_pre_attn_scalar=256, sliding_window=9)
CASES = {
    "llama": ("Llama", _SIZES),
    "llama-tied": ("Llama", _SIZES | dict(tie_word_embeddings=True, num_key_value_heads=4)),
    "llama-biases": ("Llama", _SIZES | dict(attention_bias=True, mlp_bias=True, head_dim=32)),
    "llama-linear-rope": ("Llama", _SIZES | dict(
        rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=10000.0))),
    "llama3-rope": ("Llama", _SIZES | dict(rope_parameters=_LLAMA3_ROPE)),
    "mistral": ("Mistral", _SIZES | dict(sliding_window=None, head_dim=64)),
    "qwen2": ("Qwen2", _SIZES | dict(rope_parameters=dict(rope_type="default", rope_theta=1e6))),
    "qwen3": ("Qwen3", _SIZES | dict(head_dim=128, tie_word_embeddings=True)),
    "qwen3-moe": ("Qwen3Moe", _SIZES | dict(head_dim=64, num_experts=6, num_experts_per_tok=3, norm_topk_prob=True,
                                            moe_intermediate_size=64)),
    "gemma2": ("Gemma2", _SIZES | _GEMMA),
    "gemma2-caps": ("Gemma2", _SIZES | _GEMMA | dict(attn_logit_softcapping=5.0, final_logit_softcapping=3.0)),
    "gemma3": ("Gemma3Text", _SIZES | _GEMMA | dict(num_hidden_layers=7)),
    "gpt2": ("GPT2", dict(vocab_size=97, n_embd=256, n_head=4, n_layer=2, n_inner=1024, embd_pdrop=0.0, attn_pdrop=0.0,
                          resid_pdrop=0.0, bos_token_id=0, eos_token_id=0)),
}


def make(case: str, **changes: object) -> torch.nn.Module:
    """A random model without dropout, whose norms and biases are not what they are initialized to."""
    name, settings = CASES[case]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**settings | changes)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            scale = parameter.ndim == 1 and key.endswith("weight")
            parameter.normal_(1.0 if scale else 0.0, 0.15 if parameter.ndim == 1 else 0.06)
    return model


def architecture(model: torch.nn.Module) -> str:
    """What the converter writes as a model's architecture: Mistral is a LLaMA to llama.cpp."""
    family = model.config.model_type
    return {"mistral": "llama", "gemma3_text": "gemma3", "qwen3_moe": "qwen3moe"}.get(family, family)


def write(model: torch.nn.Module, path: Path, kind: KINDS = KINDS.F32, *, metadata: dict[str, Any] | None = None,
          tensors: dict[str, np.ndarray | None] | None = None) -> None:
    """Writes a model.

    Args:
      kind: of matrices; vectors are float32. A k-quant, which `gguf` cannot write, gets random codes.
      metadata: more keys, or others; None leaves one out.
      tensors: more tensors by their names in the file, or others; None leaves one out.
    """
    config, family = model.config, architecture(model)
    writer = gguf.GGUFWriter(path, family)
    settings = (_gpt2_settings if family == "gpt2" else _llama_settings)(config)
    for key, value in ({f"{family}.{key}": value for key, value in settings.items()} | (metadata or {})).items():
        _add(writer, key, value)
    arrays = _named_arrays(model)
    if (getattr(config, "rope_parameters", None) or {}).get("rope_type") == "llama3":
        plain = config.rope_parameters["rope_theta"] ** (-torch.arange(0, 64, 2) / 64)
        arrays["rope_freqs.weight"] = (plain / model.model.rotary_emb.inv_freq).numpy()
    rng = np.random.default_rng(0)
    for name, array in (arrays | (tensors or {})).items():
        if array is None:
            continue
        array = np.ascontiguousarray(array, np.float32)
        if array.ndim == 1 or array.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
            writer.add_tensor(name, array)
        elif kind in _PER_BLOCK:
            writer.add_tensor(name, _random_blocks(rng, array.shape, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, gguf.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _random_blocks(rng: np.random.Generator, shape: tuple[int, ...], kind: KINDS) -> np.ndarray:
    weights, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (*shape[:-1], shape[-1] // weights, size), np.uint8)
    for at in _PER_BLOCK[kind]:
        blocks[..., at : at + 2] = np.frombuffer(np.float16(2e-4).tobytes(), np.uint8)
    return blocks.reshape(*shape[:-1], -1)


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if key == "general.architecture" or value is None:
        return
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    (writer.add_array if isinstance(value, list) else kinds[type(value)])(key, value)


def _llama_settings(config: Any) -> dict[str, Any]:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    settings = {
        "context_length": config.max_position_embeddings, "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers, "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads, "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps), "rope.freq_base": float(rope["rope_theta"]),
        "attention.key_length": head_dim, "attention.value_length": head_dim, "rope.dimension_count": head_dim,
        "vocab_size": config.vocab_size,
    }  # fmt: skip
    if hasattr(config, "moe_intermediate_size"):
        settings |= {"expert_count": config.num_experts, "expert_used_count": config.num_experts_per_tok,
                     "expert_feed_forward_length": config.moe_intermediate_size}
    if config.model_type.startswith("gemma"):
        settings |= {"attention.sliding_window": config.sliding_window}
        settings |= {name: getattr(config, name) for name in ("attn_logit_softcapping", "final_logit_softcapping")}
    if rope["rope_type"] == "linear":
        settings |= {"rope.scaling.type": "linear", "rope.scaling.factor": rope["factor"]}
    return settings


def _gpt2_settings(config: Any) -> dict[str, Any]:
    return {"context_length": config.n_positions, "embedding_length": config.n_embd, "block_count": config.n_layer,
            "feed_forward_length": config.n_inner, "attention.head_count": config.n_head,
            "attention.layer_norm_epsilon": float(config.layer_norm_epsilon), "vocab_size": config.vocab_size}


_GEMMA_NAMES = {"post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
                "post_feedforward_layernorm": "post_ffw_norm"}
_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "model.layers.": "blk.",
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "mlp.gate.": "ffn_gate_inp.", "mlp.experts.down_proj": "ffn_down_exps.weight",
    "transformer.wte": "token_embd", "transformer.wpe": "position_embd", "transformer.ln_f": "output_norm",
    "transformer.h.": "blk.", "ln_1": "attn_norm", "ln_2": "ffn_norm", "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
}  # fmt: skip


def _named_arrays(model: torch.nn.Module) -> dict[str, np.ndarray]:
    config, arrays = model.config, {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array, names = tensor.numpy(), _NAMES
        if config.model_type.startswith("gemma"):
            array, names = (array + 1 if "norm" in name else array), _NAMES | _GEMMA_NAMES
        if config.model_type == "gpt2" and name.endswith(("c_attn.weight", "c_fc.weight", "c_proj.weight")):
            array = array.T
        if architecture(model) in ("llama", "llada") and ".q_proj." in name:
            array = _interleave(array, config.num_attention_heads)
        if architecture(model) in ("llama", "llada") and ".k_proj." in name:
            array = _interleave(array, config.num_key_value_heads)
        for old, new in names.items():
            name = name.replace(old, new)
        if name.endswith(joined := "mlp.experts.gate_up_proj"):
            for part, matrices in zip(("gate", "up"), np.split(array, 2, axis=1), strict=True):
                arrays[name.replace(joined, f"ffn_{part}_exps.weight")] = matrices
            continue
        arrays[name] = array
    return arrays


def _interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """The rows of each head with the two elements of RoPE's pairs next to each other, as llama.cpp rotates them."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
