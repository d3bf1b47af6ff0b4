"""Tiny drafters and their targets as z-lab and DeepSpec publish them: their config.json, their names, random weights.

The weights follow from the names, so that whoever writes these files again has the same ones.
"""

import json
import zlib
from pathlib import Path

import numpy as np
import safetensors.numpy
import transformers

VOCAB, HIDDEN, BLOCK, MASK, EOS = 37, 32, 4, 36, 2
IDS = [1, 2, 4]
_TARGET = dict(vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2,
               head_dim=8, intermediate_size=48, max_position_embeddings=64, bos_token_id=1, eos_token_id=EOS,
               pad_token_id=None, tie_word_embeddings=False)
TARGETS = {"llama": "Llama", "qwen3": "Qwen3"}

_LAYERS = dict(
    model_type="qwen3", vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, intermediate_size=40, max_position_embeddings=64, hidden_act="silu",
    rms_norm_eps=1e-6, attention_bias=False, attention_dropout=0.0, initializer_range=0.02, num_target_layers=6,
    layer_types=["full_attention"] * 3, sliding_window=None, use_sliding_window=False, max_window_layers=3,
    bos_token_id=1, eos_token_id=EOS, tie_word_embeddings=False, use_cache=True)  # fmt: skip
_DFLASH = _LAYERS | dict(
    architectures=["DFlashDraftModel"], block_size=BLOCK, rope_theta=10000.0, rope_scaling=None, dtype="float32",
    dflash_config=dict(mask_token_id=MASK, target_layer_ids=IDS))  # fmt: skip
_DFLASH2 = _LAYERS | dict(
    architectures=["DFlash2DraftModel"], is_causal=False, dtype="float32", layer_types=["sliding_attention"] * 3,
    sliding_window=6, use_sliding_window=True, rope_parameters=dict(rope_theta=10000.0, rope_type="default"),
    dflash_config=dict(block_size=BLOCK, conv_group_size=8, conv_kernel_size=2, mask_token_id=MASK, selector_rank=8,
                       selector_top_k=5, target_layer_ids=IDS))  # fmt: skip
_DSPARK = _LAYERS | dict(
    architectures=["Qwen3DSparkModel"], block_size=BLOCK, target_layer_ids=IDS, mask_token_id=MASK, num_anchors=512,
    markov_rank=8, markov_head_type="vanilla", enable_confidence_head=True, confidence_head_with_markov=True,
    rope_parameters=dict(rope_theta=10000.0, rope_type="default"), dtype="float32")  # fmt: skip

# The target and config.json of each.
CASES = {
    "dflash-llama": ("llama", _DFLASH),
    "dflash-qwen3": ("qwen3", _DFLASH),
    "dflash-window": ("qwen3", _DFLASH | dict(
        layer_types=["sliding_attention", "full_attention", "sliding_attention"], sliding_window=6,
        use_sliding_window=True)),
    "dflash2": ("qwen3", _DFLASH2),
    "dspark": ("qwen3", _DSPARK),
    "dspark-llama-gated": ("llama", _DSPARK | dict(markov_head_type="gated", confidence_head_with_markov=False)),
    "dspark-rnn": ("qwen3", _DSPARK | dict(markov_head_type="rnn")),
    "dspark-plain": ("qwen3", {name: value for name, value in _DSPARK.items() if not name.startswith("confidence")}
                     | dict(markov_rank=0, enable_confidence_head=False)),
}


def write_target(name: str, directory: Path) -> transformers.PreTrainedModel:
    """Writes a target as transformers does, and returns it."""
    import torch

    config = getattr(transformers, f"{TARGETS[name]}Config")(**_TARGET)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(_values(f"target.{parameter_name}", parameter.shape)))
    model.save_pretrained(directory)
    return model


def write_drafter(case: str, directory: Path, target: Path, shards: int = 1) -> None:
    """Writes a drafter; `target` is the directory of its target."""
    config = CASES[case][1]
    tensors = {name: _values(name, shape) for name, shape in published_shapes(config).items()}
    if config["architectures"] == ["Qwen3DSparkModel"]:
        stored = safetensors.numpy.load_file(target / "model.safetensors")
        tensors |= {"embed_tokens.weight": stored["model.embed_tokens.weight"],
                    "lm_head.weight": stored["lm_head.weight"]}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    if shards == 1:
        safetensors.numpy.save_file(tensors, directory / "model.safetensors")
        return
    files = {name: f"model-{i % shards}.safetensors" for i, name in enumerate(tensors)}
    for file in set(files.values()):
        safetensors.numpy.save_file({name: tensors[name] for name in tensors if files[name] == file}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


def published_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Returns the published names and shapes of a drafter's own tensors."""
    width, heads, kv, head = (config[name] for name in (
        "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"))
    mlp, vocab, rank, nested = (config["intermediate_size"], config["vocab_size"], config.get("markov_rank", 0),
                                config.get("dflash_config", {}))
    ids = nested.get("target_layer_ids") or config["target_layer_ids"]
    shapes = {"fc.weight": (width, len(ids) * width), "hidden_norm.weight": (width,), "norm.weight": (width,)}
    for i in range(config["num_hidden_layers"]):
        layer = {"input_layernorm": (width,), "post_attention_layernorm": (width,),
                 "self_attn.q_proj": (heads * head, width), "self_attn.k_proj": (kv * head, width),
                 "self_attn.v_proj": (kv * head, width), "self_attn.o_proj": (width, heads * head),
                 "self_attn.q_norm": (head,), "self_attn.k_norm": (head,), "mlp.gate_proj": (mlp, width),
                 "mlp.up_proj": (mlp, width), "mlp.down_proj": (width, mlp)}
        shapes |= {f"layers.{i}.{name}.weight": shape for name, shape in layer.items()}
        if "conv_kernel_size" in nested:
            taps = nested["conv_kernel_size"]
            for conv in ("attention_conv", "mlp_conv"):
                shapes[f"layers.{i}.{conv}.base_kernel"] = (2, taps, width)
                shapes[f"layers.{i}.{conv}.kernel_projection.weight"] = (
                    2 * taps * width // nested["conv_group_size"], width)
    if "selector_rank" in nested:
        small = nested["selector_rank"]
        shapes |= {"candidate_selector.predecessor_codebook": (vocab, small),
                   "candidate_selector.successor_codebook": (vocab, small),
                   "candidate_selector.hidden_projection.weight": (small, width)}
    if rank:
        shapes |= {"markov_head.markov_w1.weight": (vocab, rank), "markov_head.markov_w2.weight": (vocab, rank)}
        if config["markov_head_type"] == "gated":
            shapes |= {"markov_head.gate_proj.weight": (rank, width + rank), "markov_head.gate_proj.bias": (rank,)}
        if config["markov_head_type"] == "rnn":
            shapes |= {"markov_head.joint_proj.weight": (3 * rank, 2 * rank + width),
                       "markov_head.joint_proj.bias": (3 * rank,)}
    if config.get("enable_confidence_head"):
        inputs = width + rank * config["confidence_head_with_markov"]
        shapes |= {"confidence_head.proj.weight": (1, inputs), "confidence_head.proj.bias": (1,)}
    return shapes


def prompt(length: int = 24) -> np.ndarray:
    """Random int64 [length]."""
    return np.random.default_rng(0).integers(3, MASK, length)


def _values(name: str, shape: tuple[int, ...]) -> np.ndarray:
    random = np.random.default_rng(zlib.crc32(name.encode()))
    is_scale = len(shape) == 1 and name.endswith("weight")
    # All embeddings share something that makes one token likelier, so that a random drafter is right now and then.
    shared = np.zeros(shape)
    if name.endswith(("embed_tokens.weight", "lm_head.weight")):
        shared[slice(None) if "embed" in name else 5] = 0.52 * np.cos(np.arange(shape[1]))
    return ((1.0 if is_scale else 0.0) + shared + random.normal(0.0, 0.2, shape)).astype(np.float32)
