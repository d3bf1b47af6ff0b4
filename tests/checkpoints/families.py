"""Tiny Hugging Face models of every family, with biases and norms that are not what they are initialized to."""

import functools
import json
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import safetensors.torch
import torch
import transformers
from flax import nnx

from dlm_jax.attention import AttentionMask
from dlm_jax.models import Transformer

torch.set_num_threads(1)

_GPT2 = dict(vocab_size=97, n_embd=32, n_head=4, n_layer=2, n_positions=48, bos_token_id=0, eos_token_id=0)
_LLAMA = dict(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
              intermediate_size=56, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=None)
_GEMMA = _LLAMA | dict(num_hidden_layers=4, head_dim=12, query_pre_attn_scalar=12)
_EXPERTS = dict(num_experts=6, num_experts_per_tok=3, moe_intermediate_size=20)
_LAYER_TYPES = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]

LENGTH = 48

CASES = {
    "gpt2": ("GPT2", _GPT2),
    "gpt2-untied-relu": ("GPT2", _GPT2 | dict(tie_word_embeddings=False, n_inner=40, activation_function="relu")),
    "llama1": ("Llama", _LLAMA | dict(num_key_value_heads=4)),
    "llama2-grouped-tied": ("Llama", _LLAMA | dict(tie_word_embeddings=True)),
    "llama-biases": ("Llama", _LLAMA | dict(attention_bias=True, mlp_bias=True, head_dim=12)),
    "llama-linear-rope": ("Llama", _LLAMA | dict(
        max_position_embeddings=16, rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=10000.0))),
    "llama3-rope": ("Llama", _LLAMA | dict(rope_parameters=dict(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, rope_theta=500000.0,
        original_max_position_embeddings=16))),
    "yarn-rope": ("Qwen2", _LLAMA | dict(rope_parameters=dict(
        rope_type="yarn", factor=4.0, rope_theta=10000.0, original_max_position_embeddings=16))),
    "yarn-rope-scales": ("Qwen3", _LLAMA | dict(head_dim=24, rope_parameters=dict(
        rope_type="yarn", factor=8.0, rope_theta=5e5, original_max_position_embeddings=32, beta_fast=4.0,
        beta_slow=0.5, mscale=1.0, mscale_all_dim=0.3, truncate=False))),
    "dynamic-rope": ("Llama", _LLAMA | dict(rope_parameters=dict(
        rope_type="dynamic", factor=2.0, rope_theta=10000.0))),
    "stablelm-partial-rope": ("StableLm", _LLAMA | dict(
        head_dim=None, use_qkv_bias=True, rope_parameters=dict(
            rope_type="linear", factor=2.0, rope_theta=10000.0, partial_rotary_factor=0.5))),
    "mistral-window": ("Mistral", _LLAMA | dict(sliding_window=7, head_dim=16)),
    "qwen2": ("Qwen2", _LLAMA),
    "qwen2-window": ("Qwen2", _LLAMA | dict(use_sliding_window=True, sliding_window=5, max_window_layers=0)),
    "qwen2-two-types": ("Qwen2", _LLAMA | dict(
        num_hidden_layers=4, use_sliding_window=True, sliding_window=5, max_window_layers=2)),
    "qwen3": ("Qwen3", _LLAMA | dict(head_dim=24, tie_word_embeddings=True)),
    "qwen3-moe": ("Qwen3Moe", _LLAMA | _EXPERTS),
    "qwen3-moe-norm": ("Qwen3Moe", _LLAMA | _EXPERTS | dict(norm_topk_prob=True, head_dim=12, attention_bias=True)),
    "gemma2": ("Gemma2", _GEMMA | dict(attn_logit_softcapping=1.0, final_logit_softcapping=2.0, sliding_window=7)),
    "gemma2-no-caps": ("Gemma2", _GEMMA | dict(
        attn_logit_softcapping=None, final_logit_softcapping=None, attention_bias=True, query_pre_attn_scalar=8)),
    "gemma3": ("Gemma3Text", _GEMMA | dict(sliding_window=7, layer_types=_LAYER_TYPES)),
    "gemma3-scaled-rope": ("Gemma3Text", _GEMMA | dict(
        sliding_window=7, layer_types=_LAYER_TYPES, query_pre_attn_scalar=10, tie_word_embeddings=False,
        rope_parameters=dict(full_attention=dict(rope_type="linear", factor=4.0, rope_theta=5e4),
                             sliding_attention=dict(rope_type="default", rope_theta=100.0)))),
    "gemma3-one-type": ("Gemma3Text", _GEMMA | dict(sliding_window=7, layer_types=["sliding_attention"] * 4)),
}


def make(case: str, seed: int = 0) -> torch.nn.Module:
    """A random HF model without dropout."""
    name, settings = CASES[case]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{name}Config")(**settings)
    for dropout in ("embd_pdrop", "attn_pdrop", "resid_pdrop"):
        if hasattr(config, dropout):
            setattr(config, dropout, 0.0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            is_norm_scale = parameter.ndim == 1 and parameter_name.endswith("weight")
            parameter.normal_(1.0 if is_norm_scale else 0.0, 0.15)
    return model


def save(case: str, directory: Path, seed: int = 0, **options: object) -> torch.nn.Module:
    """Makes a model and writes it as transformers does."""
    model = make(case, seed)
    model.save_pretrained(directory, **options)
    return model


def by_expert(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors as checkpoints name them: transformers 5 joins the experts of a layer, and their gate and up."""
    found = {}
    for name, tensor in tensors.items():
        layer, joined, kind = name.partition(".experts.")
        if not joined:
            found[name] = tensor
            continue
        for expert, matrix in enumerate(tensor):
            kinds = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
            for name, part in zip(kinds, matrix.chunk(len(kinds)), strict=True):
                found[f"{layer}.experts.{expert}.{name}.weight"] = part
    return found


def tokens(batch: int = 2, length: int = LENGTH, seed: int = 0) -> np.ndarray:
    """Random int32 [batch, length]."""
    return np.random.default_rng(seed).integers(3, 97, (batch, length)).astype(np.int32)


def torch_logits(model: torch.nn.Module, inputs: np.ndarray) -> np.ndarray:
    """Causal logits of an HF model."""
    with torch.no_grad():
        return model(torch.from_numpy(inputs).long()).logits.numpy()


def logits(model: Transformer, inputs: np.ndarray,
           attention: AttentionMask = AttentionMask.causal()) -> np.ndarray:
    """Logits of this library's model, by one program per architecture."""
    return np.asarray(_logits(*nnx.split(model), inputs, attention))


@functools.partial(jax.jit, static_argnums=0)
def _logits(graphdef: nnx.GraphDef, params: nnx.State, inputs: np.ndarray, attention: AttentionMask) -> jax.Array:
    return nnx.merge(graphdef, params)(inputs, attention)


def rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], object],
            file: str = "model.safetensors") -> None:
    """Applies `change` to the tensors of a checkpoint."""
    path = directory / file
    state = safetensors.torch.load_file(path)
    change(state)
    safetensors.torch.save_file(state, path)


def set_config(directory: Path, file: str = "config.json", **settings: object) -> None:
    """Changes settings in a checkpoint's config.json, or in another of its files."""
    path = directory / file
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
