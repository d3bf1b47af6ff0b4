"""Names: which HF tensor holds which of our parameters, one short table a family.

A table maps the path of a parameter to its HF tensor (`{i}` is the layer), how the axes of one layer are
laid out there, and, for a fused tensor, which third of its last axis is meant. Layouts read like einsum:
"dhk->(hk)d" says that our [embed, heads, head_dim] is stored as [heads * head_dim, embed]. Both directions
follow from that one string, and the way in is a view: nothing is copied until it is wanted.
"""

import math
import re
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from dlm_jax.errors import ConfigError
from dlm_jax.models import ModelConfig


class Key(NamedTuple):
    """Where a parameter is stored: HF tensor name, axis layout, and third of a fused tensor."""

    name: str
    layout: str = ""
    third: int | None = None


_GPT2 = {
    "embed.embedding": Key("transformer.wte.weight"),
    "positions.embedding": Key("transformer.wpe.weight"),
    "blocks.attention_norm.scale": Key("transformer.h.{i}.ln_1.weight"),
    "blocks.attention_norm.bias": Key("transformer.h.{i}.ln_1.bias"),
    "blocks.attention.q.kernel": Key("transformer.h.{i}.attn.c_attn.weight", "dhk->d(hk)", 0),
    "blocks.attention.k.kernel": Key("transformer.h.{i}.attn.c_attn.weight", "dhk->d(hk)", 1),
    "blocks.attention.v.kernel": Key("transformer.h.{i}.attn.c_attn.weight", "dhk->d(hk)", 2),
    "blocks.attention.q.bias": Key("transformer.h.{i}.attn.c_attn.bias", "hk->(hk)", 0),
    "blocks.attention.k.bias": Key("transformer.h.{i}.attn.c_attn.bias", "hk->(hk)", 1),
    "blocks.attention.v.bias": Key("transformer.h.{i}.attn.c_attn.bias", "hk->(hk)", 2),
    "blocks.attention.out.kernel": Key("transformer.h.{i}.attn.c_proj.weight", "hkd->(hk)d"),
    "blocks.attention.out.bias": Key("transformer.h.{i}.attn.c_proj.bias"),
    "blocks.mlp_norm.scale": Key("transformer.h.{i}.ln_2.weight"),
    "blocks.mlp_norm.bias": Key("transformer.h.{i}.ln_2.bias"),
    "blocks.mlp.up.kernel": Key("transformer.h.{i}.mlp.c_fc.weight"),
    "blocks.mlp.up.bias": Key("transformer.h.{i}.mlp.c_fc.bias"),
    "blocks.mlp.down.kernel": Key("transformer.h.{i}.mlp.c_proj.weight"),
    "blocks.mlp.down.bias": Key("transformer.h.{i}.mlp.c_proj.bias"),
    "final_norm.scale": Key("transformer.ln_f.weight"),
    "final_norm.bias": Key("transformer.ln_f.bias"),
    "head.kernel": Key("lm_head.weight", "dv->vd"),
}

_LLAMA = {
    "embed.embedding": Key("model.embed_tokens.weight"),
    "blocks.attention_norm.scale": Key("model.layers.{i}.input_layernorm.weight"),
    "blocks.attention.q.kernel": Key("model.layers.{i}.self_attn.q_proj.weight", "dhk->(hk)d"),
    "blocks.attention.k.kernel": Key("model.layers.{i}.self_attn.k_proj.weight", "dhk->(hk)d"),
    "blocks.attention.v.kernel": Key("model.layers.{i}.self_attn.v_proj.weight", "dhk->(hk)d"),
    "blocks.attention.q.bias": Key("model.layers.{i}.self_attn.q_proj.bias", "hk->(hk)"),
    "blocks.attention.k.bias": Key("model.layers.{i}.self_attn.k_proj.bias", "hk->(hk)"),
    "blocks.attention.v.bias": Key("model.layers.{i}.self_attn.v_proj.bias", "hk->(hk)"),
    "blocks.attention.q_norm.scale": Key("model.layers.{i}.self_attn.q_norm.weight"),
    "blocks.attention.k_norm.scale": Key("model.layers.{i}.self_attn.k_norm.weight"),
    "blocks.attention.out.kernel": Key("model.layers.{i}.self_attn.o_proj.weight", "hkd->d(hk)"),
    "blocks.attention.out.bias": Key("model.layers.{i}.self_attn.o_proj.bias"),
    "blocks.mlp_norm.scale": Key("model.layers.{i}.post_attention_layernorm.weight"),
    "blocks.mlp.gate.kernel": Key("model.layers.{i}.mlp.gate_proj.weight", "df->fd"),
    "blocks.mlp.gate.bias": Key("model.layers.{i}.mlp.gate_proj.bias"),
    "blocks.mlp.up.kernel": Key("model.layers.{i}.mlp.up_proj.weight", "df->fd"),
    "blocks.mlp.up.bias": Key("model.layers.{i}.mlp.up_proj.bias"),
    "blocks.mlp.down.kernel": Key("model.layers.{i}.mlp.down_proj.weight", "fd->df"),
    "blocks.mlp.down.bias": Key("model.layers.{i}.mlp.down_proj.bias"),
    "final_norm.scale": Key("model.norm.weight"),
    "head.kernel": Key("lm_head.weight", "dv->vd"),
}

KEYS = {"gpt2": _GPT2, "llama": _LLAMA, "mistral": _LLAMA, "qwen2": _LLAMA, "qwen3": _LLAMA}
HEAD = "lm_head.weight"

# Causal masks and rotary tables that older versions of transformers stored; they hold nothing learned.
_BUFFER = re.compile(r"(^|\.)(attn\.bias|attn\.masked_bias|rotary_emb\.(inv_freq|cos_cached|sin_cached))$")


def embedding_name(family: str) -> str:
    """The HF name of the token embedding."""
    return KEYS[family]["embed.embedding"].name


def canonical(names: Iterable[str], family: str) -> dict[str, str]:
    """Maps HF names to the names stored in a checkpoint, which may lack the prefix or be the DiffuGPT release's.

    `gpt2` on the hub is stored without the prefix `transformer.`; the release says `embed_tokens.` and
    `denoise_model.`. Buffers that hold nothing learned are left out.
    """
    names = [name for name in names if not _BUFFER.search(name)]
    prefix = embedding_name(family).split(".")[0] + "."
    bare = not any(name.startswith((prefix, "denoise_model.")) for name in names)

    def hf_name(name: str) -> str:
        if name == "embed_tokens.weight":
            return embedding_name(family)
        if name.startswith("denoise_model."):
            return prefix + name.removeprefix("denoise_model.")
        return prefix + name if bare and name != HEAD else name

    return {hf_name(name): name for name in names}


def release_name(name: str, family: str) -> str:
    """The DiffuGPT release's name of an HF tensor."""
    if name == embedding_name(family):
        return "embed_tokens.weight"
    prefix = embedding_name(family).split(".")[0] + "."
    return "denoise_model." + name.removeprefix(prefix) if name.startswith(prefix) else name


def projections(config: ModelConfig) -> dict[str, Key]:
    """The projections of a block by our names (q, k, v, out, gate, up, down), where each kernel is stored."""
    found = {path.split(".")[-2]: key for path, key in KEYS[config.family].items()
             if path.startswith("blocks.") and path.endswith(".kernel")}
    return {name: key for name, key in found.items() if name != "gate" or config.gated_mlp}


def module_name(key: Key) -> str:
    """The HF module of a tensor, inside its layer if it is in one: `self_attn.q_proj`, `lm_head`."""
    return key.name.partition("{i}.")[2].removesuffix(".weight") or key.name.removesuffix(".weight")


def read_targets(names: Iterable[str], config: ModelConfig) -> tuple[str, ...]:
    """Our names of projections that are named in ours or in HF's way (`q_proj`, `attn.c_proj`), or `all`.

    Raises:
      ConfigError: a name that none has.
    """
    known = projections(config)
    chosen = set()
    for name in names:
        found = {ours for ours, key in known.items()
                 if name in ("all", ours) or f".{module_name(key)}".endswith(f".{name}")}
        if not found:
            theirs = sorted({module_name(key).split(".")[-1] for key in known.values()})
            raise ConfigError(f"lora.targets names {name!r}, which no projection of {config.family} is called; choose "
                              f"of {', '.join(known)} (in its checkpoints {', '.join(theirs)}), or all")
        chosen |= found
    return tuple(name for name in known if name in chosen)


def layer_tensors(key: Key, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
    """HF tensor name and shape of each layer's slice of a stacked parameter, or of the parameter itself."""
    if "{i}" not in key.name:
        return [(key.name, shape)]
    return [(key.name.format(i=layer), shape[1:]) for layer in range(shape[0])]


def hf_shape(key: Key, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the HF tensor that holds a parameter (one layer of it) of this shape."""
    if key.layout:
        sizes = dict(zip(_axes(key)[0], shape, strict=True))
        shape = tuple(math.prod(sizes[axis] for axis in group) for group in _axes(key)[1])
    return shape if key.third is None else (*shape[:-1], 3 * shape[-1])


def from_hf(tensor: np.ndarray, key: Key, shape: tuple[int, ...]) -> np.ndarray:
    """The parameter (one layer of it) of this shape as a view of its HF tensor."""
    if key.third is not None:
        width = tensor.shape[-1] // 3
        tensor = tensor[..., key.third * width : (key.third + 1) * width]
    if not key.layout:
        return tensor
    ours, groups = _axes(key)
    sizes = dict(zip(ours, shape, strict=True))
    for axis in reversed(range(len(groups))):
        if len(groups[axis]) > 1:  # other axes keep the size they have: the vocabulary may be about to grow
            split = [sizes[name] for name in groups[axis]]
            tensor = tensor.reshape(*tensor.shape[:axis], *split, *tensor.shape[axis + 1 :])
    stored = "".join(groups)
    return tensor.transpose([stored.index(axis) for axis in ours])


def to_hf(array: np.ndarray, key: Key) -> np.ndarray:
    """The inverse of `from_hf`; for a fused tensor it gives one third."""
    if not key.layout:
        return array
    ours, groups = _axes(key)
    shape = hf_shape(key._replace(third=None), array.shape)
    return array.transpose([ours.index(axis) for axis in "".join(groups)]).reshape(shape)


def _axes(key: Key) -> tuple[str, list[str]]:
    """Our axes, and the groups of them that make the stored ones: "dhk->(hk)d" gives "dhk", ["hk", "d"]."""
    ours, stored = key.layout.split("->")
    return ours, [group.strip("()") for group in re.findall(r"\(\w+\)|\w", stored)]
