"""Tiny diffusion models of other projects as their authors publish them: config.json, names, random weights.

The weights follow from the names, so that whoever writes these files again has the same ones. The mask token has no
probability, as in a trained model: one channel of the residual stream is constant, and its row of the head reads it.
"""

import json
import zlib
from pathlib import Path

import numpy as np
import safetensors.numpy

VOCAB, MASK, PROMPT, NEW, EXPERTS = 97, 96, 6, 24, 6

_SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
              vocab_size=VOCAB, max_position_embeddings=64, hidden_act="silu", rms_norm_eps=1e-6, rope_theta=10000.0,
              tie_word_embeddings=False, attention_dropout=0.0, bos_token_id=1, eos_token_id=2)  # fmt: skip
_QWEN2 = _SIZES | dict(rope_scaling=None, use_sliding_window=False, sliding_window=None, max_window_layers=2)
_QWEN3 = _QWEN2 | dict(head_dim=16, attention_bias=False)
_EXPERTS = dict(num_experts=EXPERTS, num_experts_per_tok=3, router_aux_loss_coef=0.001, output_router_logits=False)
_QWEN3_MOE = _QWEN3 | _EXPERTS | dict(moe_intermediate_size=20, norm_topk_prob=True, decoder_sparse_step=1,
                                      mlp_only_layers=[])

CONFIGS = {
    "dream": _QWEN2 | dict(
        model_type="Dream", architectures=["DreamModel"], mask_token_id=MASK, pad_token_id=0,
        auto_map={"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"}),
    "llada": dict(
        model_type="llada", architectures=["LLaDAModelLM"], d_model=32, n_layers=2, n_heads=4, n_kv_heads=2,
        mlp_hidden_size=48, mlp_ratio=4, vocab_size=VOCAB, embedding_size=104, max_sequence_length=64, rope=True,
        rope_full_precision=True, rope_theta=500000.0, rms_norm_eps=1e-5, weight_tying=False, block_type="llama",
        block_group_size=1, activation_type="silu", layer_norm_type="rms", layer_norm_with_affine=True,
        attention_layer_norm=False, attention_layer_norm_with_affine=True, input_emb_norm=False, alibi=False,
        alibi_bias_max=8.0, bias_for_layer_norm=False, include_bias=False, include_qkv_bias=False, scale_logits=False,
        flash_attention=False, multi_query_attention=None, attention_dropout=0.0, residual_dropout=0.0,
        embedding_dropout=0.0, init_device="meta", init_fn="mitchell", init_std=0.02, init_cutoff_factor=None,
        precision="amp_bf16", use_cache=False, mask_token_id=MASK, eos_token_id=2, pad_token_id=2,
        auto_map={"AutoConfig": "configuration_llada.LLaDAConfig", "AutoModel": "modeling_llada.LLaDAModelLM"}),
    "sdar": _QWEN3 | dict(
        model_type="sdar", architectures=["SDARForCausalLM"], block_size=4, mask_token_id=MASK,
        attn_implementation="flex_attention", fuse_cross_entropy=True, debug=False, ep_size=1, micro_forward=False,
        skip_checkpoint=False, use_cache=False, use_deepep=False, torch_dtype="float32",
        auto_map={"AutoConfig": "configuration_sdar.SDARConfig", "AutoModel": "modeling_sdar.SDARModel",
                  "AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM"}),
    "sdar_moe": _QWEN3_MOE | dict(
        model_type="sdar_moe", architectures=["SDARMoeForCausalLM"], block_size=4, mask_token_id=MASK, use_cache=False,
        auto_map={"AutoConfig": "configuration_sdar_moe.SDARMoeConfig",
                  "AutoModelForCausalLM": "modeling_sdar_moe.SDARMoeForCausalLM"}),
    "rnd1": _QWEN3_MOE | dict(
        model_type="rnd1", architectures=["RND1"], mask_token_id=MASK, pad_token_id=0, moe_backend="hf",
        num_diffusion_steps=256, is_causal=False, use_cache=False, rope_scaling=False, sliding_window=False,
        auto_map={"AutoConfig": "configuration_rnd.RND1Config", "AutoModel": "modeling_rnd.RND1Model",
                  "AutoModelForMaskedLM": "modeling_rnd.RND1LM"}),
    "llada_moe": _SIZES | _EXPERTS | dict(
        model_type="llada", architectures=["LLaDAMoEModelLM"], mask_token_id=MASK, pad_token_id=0,
        expert_intermediate_size=20, dense_intermediate_size=48, shared_expert_intermediate_size=None,
        moe_layer_freq=[1, 1], moe_router_enable_expert_bias=False, moe_router_score_function="softmax",
        norm_topk_prob=None, routed_scaling_factor=1, router_num_group=None, router_topk_group=None, clip_qkv=None,
        qk_layernorm=True, attention_bias=False, partial_rotary_factor=1, rope_scaling=None, use_cache=False,
        auto_map={"AutoConfig": "configuration_lladamoe.LLaDAConfig",
                  "AutoModelForCausalLM": "modeling_lladamoe.LLaDAMoEModelLM"}),
    "a2d-qwen3": _QWEN3 | dict(model_type="a2d-qwen3", architectures=["A2DQwen3LMHeadModel"]),
    "a2d-qwen2": _QWEN2 | dict(model_type="a2d-qwen2", architectures=["A2DQwen2LMHeadModel"]),
    "a2d-llama": _SIZES | dict(model_type="a2d-llama", architectures=["A2DLlamaLMHeadModel"], attention_bias=False,
                               mlp_bias=False, rope_scaling=None),
}  # fmt: skip


def write(family: str, directory: Path, **settings: object) -> None:
    """Writes a checkpoint; `settings` change its config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(CONFIGS[family] | settings))
    tensors = {name: _values(name, shape) for name, shape in published_shapes(family).items()}
    safetensors.numpy.save_file(tensors, directory / "model.safetensors")


def published_shapes(family: str) -> dict[str, tuple[int, ...]]:
    """Returns the published names and shapes of a family's tensors."""
    config = CONFIGS[family]
    if family == "llada":
        rows, width, mlp, kv = config["embedding_size"], config["d_model"], config["mlp_hidden_size"], 16
        layer = {"attn_norm": (width,), "q_proj": (width, width), "k_proj": (kv, width), "v_proj": (kv, width),
                 "attn_out": (width, width), "ff_norm": (width,), "ff_proj": (mlp, width), "up_proj": (mlp, width),
                 "ff_out": (width, mlp)}
        shapes = {"wte": (rows, width), "ln_f": (width,), "ff_out": (rows, width)}
        shapes |= {f"blocks.{i}.{name}": shape for i in range(2) for name, shape in layer.items()}
        return {f"model.transformer.{name}.weight": shape for name, shape in shapes.items()}
    width, mlp, head = config["hidden_size"], config["intermediate_size"], config.get("head_dim", 8)
    heads, kv = 4 * head, 2 * head
    layer = {"input_layernorm": (width,), "post_attention_layernorm": (width,), "self_attn.q_proj": (heads, width),
             "self_attn.k_proj": (kv, width), "self_attn.v_proj": (kv, width), "self_attn.o_proj": (width, heads),
             "mlp.gate_proj": (mlp, width), "mlp.up_proj": (mlp, width), "mlp.down_proj": (width, mlp)}
    if "num_experts" in config:
        del layer["mlp.gate_proj"], layer["mlp.up_proj"], layer["mlp.down_proj"]
        layer |= {"mlp.gate": (EXPERTS, width)} | {
            f"mlp.experts.{e}.{name}": (width, 20) if name == "down_proj" else (20, width)
            for e in range(EXPERTS) for name in ("gate_proj", "up_proj", "down_proj")}
    is_qwen2 = family in ("dream", "a2d-qwen2")
    if not is_qwen2 and family != "a2d-llama":
        layer |= {"self_attn.q_norm": (head,), "self_attn.k_norm": (head,)}
    shapes = {"model.embed_tokens.weight": (VOCAB, width), "model.norm.weight": (width,),
              "lm_head.weight": (VOCAB, width)}
    shapes |= {f"model.layers.{i}.{name}.weight": shape for i in range(2) for name, shape in layer.items()}
    if is_qwen2:
        shapes |= {f"model.layers.{i}.self_attn.{name}_proj.bias": (size,) for i in range(2)
                   for name, size in (("q", heads), ("k", kv), ("v", kv))}
    return shapes


def prompt() -> np.ndarray:
    """Random int64 [PROMPT]."""
    return np.random.default_rng(0).integers(3, MASK, PROMPT)


def noisy_tokens(length: int = 24) -> np.ndarray:
    """Random int64 [2, length], a third of them masked."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(3, MASK, (2, length))
    return np.where(rng.random(tokens.shape) < 1 / 3, MASK, tokens)


def _values(name: str, shape: tuple[int, ...]) -> np.ndarray:
    random = np.random.default_rng(zlib.crc32(name.encode()))
    scale = 1.0 if len(shape) == 1 and name.endswith("weight") else 0.0
    values = scale + random.normal(0.0, 0.15 if scale else 0.5, shape)
    if name.endswith(("embed_tokens.weight", "wte.weight")):
        values[:, 0] = 1.5  # the constant channel
    elif name.endswith(("o_proj.weight", "attn_out.weight", "down_proj.weight")) or ".ff_out." in name.partition(
            "blocks")[2]:
        values[0] = 0.0  # which no layer changes
    elif name.endswith(("lm_head.weight", "transformer.ff_out.weight")):
        values[:, 0] = 0.0  # and which says nothing about the other tokens
        values[MASK] = np.where(np.arange(shape[1]) == 0, -200.0, 0.0)
    return values.astype(np.float32)
