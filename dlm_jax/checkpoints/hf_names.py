"""Which HF tensor holds which parameter: one table per family.

A table maps the path of a parameter to its HF tensor (`{i}` is the layer, `{e}` the expert), the layout of one layer's
axes there, and for a fused tensor the third of its last axis. Layouts read like einsum: "dhk->(hk)d" stores a kernel
[embed, heads, head_dim] as [heads * head_dim, embed]. Both directions follow from that string; import gives views and
copies nothing.
"""

import functools
import math
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
from flax import nnx

from dlm_jax.checkpoints.hf_tensors import LazyTensor
from dlm_jax.errors import ConfigError
from dlm_jax.models import ModelConfig
from dlm_jax.parallel import to_host


class Key(NamedTuple):
    """The HF tensor of a parameter: name, axis layout, and third of a fused tensor."""

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
    "blocks.attention_norm.bias": Key("model.layers.{i}.input_layernorm.bias"),
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
    "blocks.mlp_norm.bias": Key("model.layers.{i}.post_attention_layernorm.bias"),
    "blocks.mlp.gate.kernel": Key("model.layers.{i}.mlp.gate_proj.weight", "df->fd"),
    "blocks.mlp.gate.bias": Key("model.layers.{i}.mlp.gate_proj.bias"),
    "blocks.mlp.up.kernel": Key("model.layers.{i}.mlp.up_proj.weight", "df->fd"),
    "blocks.mlp.up.bias": Key("model.layers.{i}.mlp.up_proj.bias"),
    "blocks.mlp.down.kernel": Key("model.layers.{i}.mlp.down_proj.weight", "fd->df"),
    "blocks.mlp.down.bias": Key("model.layers.{i}.mlp.down_proj.bias"),
    "final_norm.scale": Key("model.norm.weight"),
    "final_norm.bias": Key("model.norm.bias"),
    "head.kernel": Key("lm_head.weight", "dv->vd"),
}

_GEMMA = _LLAMA | {
    "blocks.attention_post_norm.scale": Key("model.layers.{i}.post_attention_layernorm.weight"),
    "blocks.mlp_norm.scale": Key("model.layers.{i}.pre_feedforward_layernorm.weight"),
    "blocks.mlp_post_norm.scale": Key("model.layers.{i}.post_feedforward_layernorm.weight"),
}

_QWEN3_MOE = {path: key for path, key in _LLAMA.items() if not path.startswith("blocks.mlp.")} | {
    "blocks.mlp.router.weight": Key("model.layers.{i}.mlp.gate.weight", "de->ed"),
    "blocks.mlp.gate.kernel": Key("model.layers.{i}.mlp.experts.{e}.gate_proj.weight", "df->fd"),
    "blocks.mlp.up.kernel": Key("model.layers.{i}.mlp.experts.{e}.up_proj.weight", "df->fd"),
    "blocks.mlp.down.kernel": Key("model.layers.{i}.mlp.experts.{e}.down_proj.weight", "fd->df"),
}

KEYS = {"gpt2": _GPT2, "llama": _LLAMA, "mistral": _LLAMA, "qwen2": _LLAMA, "qwen3": _LLAMA, "stablelm": _LLAMA,
        "gemma2": _GEMMA, "gemma3_text": _GEMMA, "qwen3_moe": _QWEN3_MOE}
HEAD = "lm_head.weight"

# Prefixes in a Gemma 3 that also reads images, of transformers 4 and 5, and the parts of it that read them.
_LANGUAGE_MODEL = {"language_model.model.": "model.", "language_model.lm_head.": "lm_head.",
                   "model.language_model.": "model."}
_VISION = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\.")

# LLaDA's names of LLaMA's modules: those of a layer, and the others.
_LLADA_LAYER = {
    "attn_norm": "input_layernorm", "q_proj": "self_attn.q_proj", "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj", "attn_out": "self_attn.o_proj", "ff_norm": "post_attention_layernorm",
    "ff_proj": "mlp.gate_proj", "up_proj": "mlp.up_proj", "ff_out": "mlp.down_proj",
}  # fmt: skip
_LLADA = {"wte": "model.embed_tokens", "ln_f": "model.norm", "ff_out": "lm_head"}
_LLADA_NAME = re.compile(r"(?:model\.)?transformer\.(?:blocks\.(\d+)\.)?(\w+)\.weight")

# Causal masks and rotary tables, which older versions of transformers stored.
_BUFFER = re.compile(r"(^|\.)(attn\.bias|attn\.masked_bias|rotary_emb\.(inv_freq|cos_cached|sin_cached))$")


def embedding_name(family: str) -> str:
    """Returns the HF name of the token embedding."""
    return KEYS[family]["embed.embedding"].name


def canonical(names: Iterable[str], family: str) -> dict[str, str]:
    """Maps HF names to the names stored in a checkpoint, which may lack the prefix or be DiffuGPT's or LLaDA's.

    `gpt2` on the hub is stored without the prefix `transformer.`; DiffuGPT uses `embed_tokens.` and `denoise_model.`;
    LLaDA names LLaMA's tensors `model.transformer.`. Buffers that are not learned are omitted, and what reads images in
    a Gemma 3.
    """
    names = [name for name in names if not _BUFFER.search(name)]
    if family == "llama" and any("transformer.wte." in name for name in names):
        return {_from_llada(name): name for name in names}
    if family == "gemma3_text":
        prefixes = {name: next((prefix for prefix in _LANGUAGE_MODEL if name.startswith(prefix)), "") for name in names
                    if not _VISION.match(name)}
        if any(prefixes.values()):
            return {_LANGUAGE_MODEL.get(prefix, "") + name.removeprefix(prefix): name
                    for name, prefix in prefixes.items()}
    prefix = embedding_name(family).split(".")[0] + "."
    bare = not any(name.startswith((prefix, "denoise_model.")) for name in names)

    def hf_name(name: str) -> str:
        if name == "embed_tokens.weight":
            return embedding_name(family)
        if name.startswith("denoise_model."):
            return prefix + name.removeprefix("denoise_model.")
        return prefix + name if bare and not name.startswith("lm_head.") else name

    return {hf_name(name): name for name in names}


def _from_llada(name: str) -> str:
    """Returns LLaMA's name of a tensor of LLaDA; an unknown one as it is."""
    if (match := _LLADA_NAME.fullmatch(name)) is None:
        return name
    layer, module = match.groups()
    known = _LLADA.get(module) if layer is None else _LLADA_LAYER.get(module)
    if known is None:
        return name
    return f"{known}.weight" if layer is None else f"model.layers.{layer}.{known}.weight"


def diffugpt_name(name: str, family: str) -> str:
    """Returns the DiffuGPT reference implementation's name of an HF tensor."""
    if name == embedding_name(family):
        return "embed_tokens.weight"
    prefix = embedding_name(family).split(".")[0] + "."
    return "denoise_model." + name.removeprefix(prefix) if name.startswith(prefix) else name


def projections(config: ModelConfig) -> dict[tuple[str, ...], Key]:
    """Returns the keys of a block's projection kernels by module, such as ("blocks", "attention", "q").

    Those of experts are not among them.
    """
    return {(*module.split("."),): key for path, key in KEYS[config.family].items()
            for module, _, parameter in [path.rpartition(".")]
            if path.startswith("blocks.") and parameter == "kernel" and (config.gated_mlp or "gate" not in module)
            and "{e}" not in key.name}


def module_name(key: Key) -> str:
    """Returns the HF module of a tensor, inside its layer if it has one: `self_attn.q_proj`, `lm_head`."""
    return key.name.partition("{i}.")[2].removesuffix(".weight") or key.name.removesuffix(".weight")


def read_targets(names: Iterable[str], config: ModelConfig) -> tuple[str, ...]:
    """Returns the names (q, k, v, ...) of projections given by these or HF's names (`q_proj`, `attn.c_proj`), or `all`.

    Raises:
      ConfigError: no projection has a name.
    """
    known = {path[-1]: key for path, key in projections(config).items()}
    chosen = set()
    for name in names:
        found = {projection for projection, key in known.items()
                 if name in ("all", projection) or f".{module_name(key)}".endswith(f".{name}")}
        if not found:
            hf_modules = sorted({module_name(key).split(".")[-1] for key in known.values()})
            raise ConfigError(f"lora.targets names {name!r}, which is not a projection of {config.family}; choose "
                              f"of {', '.join(known)} (in its checkpoints {', '.join(hf_modules)}), or all")
        chosen |= found
    return tuple(name for name in known if name in chosen)


class Slice(NamedTuple):
    """The HF tensor of a slice of a stacked parameter: its name, the slice's shape, and its index in the parameter."""

    name: str
    shape: tuple[int, ...]
    index: tuple[int, ...]


def layer_tensors(key: Key, shape: tuple[int, ...]) -> list[Slice]:
    """Returns the HF tensor of each layer, or of each layer's experts, of a parameter, or of the parameter itself."""
    if "{i}" not in key.name:
        return [Slice(key.name, shape, ())]
    stacked = 2 if "{e}" in key.name else 1
    return [Slice(key.name.format(i=index[0], e=index[-1]), shape[stacked:], index)
            for index in np.ndindex(shape[:stacked])]


def key_of(keys: Mapping[str, Key], path: tuple[str, ...]) -> Key:
    """Returns the key of a parameter in a table such as `KEYS["llama"]`."""
    return keys[".".join(path)]


def stored_shapes(keys: Mapping[str, Key], params: nnx.State) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the HF tensors, by name, that hold a model's parameters."""
    return {name: hf_shape(key, shape) for path, leaf in nnx.to_flat_state(params)
            for key in [key_of(keys, path)] for name, shape, _ in layer_tensors(key, leaf.shape)}


def named_tensors(keys: Mapping[str, Key], params: nnx.State) -> dict[str, LazyTensor]:
    """Returns the HF tensors, by name, that hold a model's parameters; gathering one takes every process."""
    sources: dict[str, list[tuple[Key, nnx.Param, tuple[int, ...]]]] = {}
    for path, leaf in nnx.to_flat_state(params):
        key = key_of(keys, path)
        for name, _, index in layer_tensors(key, leaf.shape):
            sources.setdefault(name, []).append((key, leaf, index))

    def gather(name: str) -> np.ndarray:
        thirds = sorted(sources[name], key=lambda source: source[0].third or 0)
        arrays = [to_hf(to_host(leaf[...][index] if index else leaf[...]), key) for key, leaf, index in thirds]
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=-1)

    return {name: LazyTensor(shape, functools.partial(gather, name))
            for name, shape in stored_shapes(keys, params).items()}


def hf_shape(key: Key, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of the HF tensor that holds a parameter (one layer of it) of this shape."""
    if key.layout:
        sizes = dict(zip(_axes(key)[0], shape, strict=True))
        shape = tuple(math.prod(sizes[axis] for axis in group) for group in _axes(key)[1])
    return shape if key.third is None else (*shape[:-1], 3 * shape[-1])


def from_hf(tensor: np.ndarray, key: Key, shape: tuple[int, ...]) -> np.ndarray:
    """Returns a parameter (one layer of it) of this shape as a view of its HF tensor."""
    if key.third is not None:
        width = tensor.shape[-1] // 3
        tensor = tensor[..., key.third * width : (key.third + 1) * width]
    if not key.layout:
        return tensor
    axes, groups = _axes(key)
    sizes = dict(zip(axes, shape, strict=True))
    for axis in reversed(range(len(groups))):
        if len(groups[axis]) > 1:  # others keep their size: the vocabulary may still grow
            split = [sizes[name] for name in groups[axis]]
            tensor = tensor.reshape(*tensor.shape[:axis], *split, *tensor.shape[axis + 1 :])
    stored = "".join(groups)
    return tensor.transpose([stored.index(axis) for axis in axes])


def to_hf(array: np.ndarray, key: Key) -> np.ndarray:
    """Inverts `from_hf`; returns one third of a fused tensor."""
    if not key.layout:
        return array
    axes, groups = _axes(key)
    shape = hf_shape(key._replace(third=None), array.shape)
    return array.transpose([axes.index(axis) for axis in "".join(groups)]).reshape(shape)


def _axes(key: Key) -> tuple[str, list[str]]:
    """Returns the parameter's axes and the groups that are stored: "dhk->(hk)d" gives "dhk", ["hk", "d"]."""
    axes, stored = key.layout.split("->")
    return axes, [group.strip("()") for group in re.findall(r"\(\w+\)|\w", stored)]
