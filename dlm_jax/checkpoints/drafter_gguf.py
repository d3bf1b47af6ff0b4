"""Writes a drafter as the GGUF file that llama.cpp reads beside its target (`-md`), of the architecture dflash.

The file has the target's tokenizer, which is copied from the target's own GGUF file. Embedding and head are taken from
the target when it runs. llama.cpp counts the features' layers by their inputs: one more than our ids.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from dlm_jax.checkpoints.drafter_config import canonical, layout_of
from dlm_jax.checkpoints.drafter_layouts import check_target, named_tensors
from dlm_jax.checkpoints.gguf_file import is_gguf
from dlm_jax.checkpoints.source import locate
from dlm_jax.errors import CheckpointError
from dlm_jax.models import Drafter, DrafterConfig
from dlm_jax.storage import is_remote

if TYPE_CHECKING:
    from dlm_jax.checkpoints.pretrained import Pretrained

# Parts of the published names, in the order in which they are replaced, and llama.cpp's.
_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "attention_conv.base_kernel": "attn_conv_base", "attention_conv.kernel_projection": "attn_conv_proj",
    "mlp_conv.base_kernel": "ffn_conv_base", "mlp_conv.kernel_projection": "ffn_conv_proj",
    "candidate_selector.predecessor_codebook": "selector_predecessor.weight",
    "candidate_selector.successor_codebook": "selector_successor.weight",
    "candidate_selector.hidden_projection": "selector_hidden",
    "markov_head.markov_w1": "markov_w1", "markov_head.markov_w2": "markov_w2", "confidence_head.proj": "conf_proj",
    "hidden_norm": "enc.output_norm", "layers.": "blk.",
}  # fmt: skip


def save_drafter_gguf(path: str | Path, drafter: Drafter, target: "Pretrained", *, dtype: str = "float32") -> None:
    """Writes a drafter as a GGUF file, which appears complete or not at all.

    Args:
      target: the model that it guesses for, opened from a GGUF file.
      dtype: of matrices, "float32" or "bfloat16"; vectors are float32.

    Raises:
      CheckpointError: llama.cpp does not compute this drafter, the target is not in a GGUF file, or the path holds
        something else.
    """
    check_target(drafter, target.model, "this")
    settings = _settings(drafter.config)
    source, path = locate(target.source), Path(path).expanduser()
    if not is_gguf(source):
        raise CheckpointError(f"a drafter's GGUF file has the tokenizer of its target's, and {target.source} is not "
                              "one; name the target's GGUF file as the model, or have llama.cpp convert the drafter's "
                              "directory (convert_hf_to_gguf.py --target-model-dir)")
    if is_remote(path) or path.is_dir() or not path.parent.is_dir() or (path.exists() and not is_gguf(path)):
        raise CheckpointError(f"{path} is not the place of a GGUF file; choose one that ends with .gguf, in a folder "
                              "that exists")
    tensors = named_tensors(drafter)
    if jax.process_index() > 0:  # gathering a tensor takes every process
        for tensor in tensors.values():
            tensor.values()
        return
    import gguf

    temporary = path.with_name(f".{path.name}.new-{os.getpid()}")
    writer = gguf.GGUFWriter(temporary, "dflash")
    try:
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, list: writer.add_array}
        for key, value in settings.items():
            add[type(value)](f"dflash.{key}", value)
        for field in gguf.GGUFReader(source).fields.values():
            if field.name.startswith("tokenizer.") and field.name != "tokenizer.ggml.mask_token_id":
                inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
                writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)
        writer.add_mask_token_id(drafter.config.mask_token_id)
        for name, (shape, values) in tensors.items():
            kind = gguf.GGMLQuantizationType.F32
            if dtype == "bfloat16" and len(shape) == 2 and not name.startswith("confidence_head"):
                kind = gguf.GGMLQuantizationType.BF16
            writer.add_tensor(_gguf_name(name), gguf.quantize(np.ascontiguousarray(values(), np.float32), kind),
                              raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _settings(config: DrafterConfig) -> dict[str, Any]:
    """Returns the metadata after "dflash.".

    Raises:
      CheckpointError: llama.cpp does not compute this drafter.
    """
    config, layout = canonical(config), layout_of(config)
    layers, number = config.layers, config.layers.num_layers
    reasons = {
        "the layers of another family than qwen3": layers.family != "qwen3" or layers.activation != "silu",
        "biases in its layers": layers.qkv_bias or layers.out_bias,
        "scaled rotary positions": layers.rope_scaling is not None,
        "slots that do not see later ones": (config.causal and len(config.sliding_layers) < number)
        or (config.sliding_causal and bool(config.sliding_layers)),
        f"a Markov head {config.markov_head}": config.markov_head != "vanilla",
        "every slot guess without a Markov head": layout == "dspark" and not config.markov_rank,
        "confidences that do not see the token before": config.confidence_head and not config.confidence_with_markov,
        "more candidates than its width allows": layers.hidden_size < config.selector_top_k * (
            config.selector_top_k + 1) and config.selector_rank > 0,
    }
    if refused := [reason for reason, holds in reasons.items() if holds]:
        raise CheckpointError(f"llama.cpp does not compute this drafter, which has {', '.join(refused)}")
    settings = {
        "context_length": layers.max_length, "embedding_length": layers.hidden_size, "block_count": number,
        "feed_forward_length": layers.mlp_size, "attention.head_count": layers.num_heads,
        "attention.head_count_kv": layers.num_kv_heads, "attention.key_length": layers.head_dim,
        "attention.value_length": layers.head_dim, "attention.layer_norm_rms_epsilon": layers.norm_eps,
        "attention.causal": False, "rope.freq_base": float(layers.rope_theta), "vocab_size": layers.vocab_size,
        "block_size": config.block_size, "sample_from_anchor": config.sample_from_anchor,
        "target_layers": [layer + 1 for layer in config.target_layer_ids],
    }
    if config.sliding_layers:
        settings |= {"attention.sliding_window": layers.sliding_window,
                     "attention.sliding_window_pattern": [layer in config.sliding_layers for layer in range(number)]}
    if layout == "dflash2":
        names = ("conv_kernel_size", "conv_group_size", "selector_rank", "selector_top_k")
        settings |= {name: getattr(config, name) for name in names}
    return settings


def _gguf_name(name: str) -> str:
    if name == "norm.weight":
        return "output_norm.weight"
    for old, new in _NAMES.items():
        name = name.replace(old, new)
    return name
