"""The config.json of diffusion models of other projects, rewritten as an export of this library has it.

Their tensors are those of a family of transformers. What their own code would run is known by `model_type` and
`architectures`: what only looks like one of them, or like an autoregressive model, is refused.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dlm_jax.checkpoints import hf_moe
from dlm_jax.checkpoints.settings import check_implemented, require
from dlm_jax.diffusion import BlockSpec
from dlm_jax.errors import CheckpointError
from dlm_jax.storage import read_json


class DiffusionFamily(NamedTuple):
    """A diffusion model of another project: the network of a family of transformers under a model_type of its own.

    Attributes:
      architecture: the class of its code.
      family: the family of transformers that computes the same.
      mask_token_id: the default of its code; None: config.json or the tokenizer gives it.
      size_key: the key of its config.json that gives the tokens per block; None: it sees entire rows.
      size: the default of its code.
      sampling: how its own code samples, as settings of `sampling.SamplerConfig`.
    """

    architecture: str
    family: str
    shift: bool
    mask_token_id: int | None = None
    size_key: str | None = None
    size: int | None = None
    sampling: Mapping[str, Any] = {}


# As the samplers of LLaDA and dllm: one token per step in blocks of 32, of 128 new tokens.
_LOW_CONFIDENCE = {"policy": "confidence", "num_steps": 128, "block_length": 32, "temperature": 0.0}
# Of the class of Dream's generation_config.json.
_DREAM_SAMPLING = {"policy": "random", "num_steps": 512, "step_schedule": "dream", "temperature": 0.0}

_RND1_SAMPLING = {"policy": "entropy", "num_steps": 256, "temperature": 0.0}  # num_diffusion_steps of its config

# Dream (arXiv 2508.15487), with DiffuCoder and Dream-Coder; LLaDA (arXiv 2502.09992), with LLaDA 1.5; SDAR (arXiv
# 2510.06303), with TraDo; Fast-dLLM v2 (arXiv 2509.26328); LLaDA-MoE (arXiv 2509.24389);
# RND1 (github.com/RadicalNumerics/RND1); Tiny-A2D (dllm, arXiv 2602.22661). As in their code; in all
# with blocks, clean blocks are bidirectional.
DIFFUSION_FAMILIES = {
    "Dream": DiffusionFamily("DreamModel", "qwen2", shift=True, mask_token_id=151666, sampling=_DREAM_SAMPLING),
    "llada": DiffusionFamily("LLaDAModelLM", "llama", shift=False, mask_token_id=126336, sampling=_LOW_CONFIDENCE),
    "sdar": DiffusionFamily("SDARForCausalLM", "qwen3", shift=False, size_key="block_size", size=4),
    "Fast_dLLM_Qwen": DiffusionFamily("Fast_dLLM_QwenForCausalLM", "qwen2", shift=True, size_key="bd_size", size=32,
                                      mask_token_id=151665),
    "llada_moe": DiffusionFamily("LLaDAMoEModelLM", "qwen3_moe", shift=False, mask_token_id=156895,
                                 sampling=_LOW_CONFIDENCE),
    "rnd1": DiffusionFamily("RND1LM", "qwen3_moe", shift=True, mask_token_id=151669, sampling=_RND1_SAMPLING),
    "sdar_moe": DiffusionFamily("SDARMoeForCausalLM", "qwen3_moe", shift=False, size_key="block_size", size=4),
    **{f"a2d-{name.lower()}": DiffusionFamily(f"A2D{name}LMHeadModel", name.lower(), shift=False, size_key="block_size",
                                              sampling=_LOW_CONFIDENCE) for name in ("Qwen3", "Qwen2", "Llama")},
}

# Classes of an autoregressive model's config.json, after the name of its family, and that of DiffuGPT.
_PLAIN_CLASSES = ("forcausallm", "lmheadmodel", "model", "forconditionalgeneration")
_DIFFUGPT_CLASS = "DiscreteDiffusionModel"

# LLaDA's names of LLaMA's settings.
_LLADA_NAMES = {
    "d_model": "hidden_size", "n_heads": "num_attention_heads", "n_layers": "num_hidden_layers",
    "max_sequence_length": "max_position_embeddings", "rms_norm_eps": "rms_norm_eps", "rope_theta": "rope_theta",
    "weight_tying": "tie_word_embeddings", "init_std": "initializer_range",
    "attention_dropout": "attention_dropout", "bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id",
    "pad_token_id": "pad_token_id", "use_cache": "use_cache",
}  # fmt: skip
# LLaDA's settings that LLaMA's network has built in: the values that say so, and defaults of LLaDA's class that do not.
_LLADA_BUILT_IN: dict[str, tuple[Any, ...]] = {
    "block_type": ("llama",), "block_group_size": (1,), "activation_type": ("silu",), "layer_norm_type": ("rms",),
    "layer_norm_with_affine": (True,), "rope": (True,), "alibi": (False,), "attention_layer_norm": (False,),
    "input_emb_norm": (False,), "scale_logits": (False,), "include_bias": (False,), "include_qkv_bias": (False, None),
    "bias_for_layer_norm": (False, None), "embedding_dropout": (0,), "residual_dropout": (0,),
}  # fmt: skip
_LLADA_DEFAULTS = {"block_type": "sequential", "activation_type": "swiglu", "layer_norm_type": "default", "rope": False,
                   "embedding_dropout": 0.1, "residual_dropout": 0.1}

# Dream's names of reveal policies.
_DREAM_POLICIES = {"origin": "random", "maskgit_plus": "confidence", "topk_margin": "margin", "entropy": "entropy"}
_DREAM_LAST_TIME = 1e-3  # of the step schedule "dream"


def rewrite_config(hf: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Returns a config.json as an export of this library has it; one that is not of a diffusion family as it is.

    Args:
      directory: has generation_config.json, if there is one; its name tells apart models whose config.json does not.

    Raises:
      CheckpointError: a setting or a class that this library does not implement.
    """
    family = DIFFUSION_FAMILIES.get(hf.get("model_type"))
    if family is None:
        return hf
    if "num_experts" in hf and family.family not in hf_moe.FAMILIES:
        raise CheckpointError(f"config.json of {hf['model_type']!r} sets num_experts to {hf['num_experts']!r}, and "
                              "this library reads models of this type without experts alone")
    found = hf.get("architectures") or [family.architecture]
    if found[0] != family.architecture:
        raise CheckpointError(f"config.json has model_type {hf['model_type']!r} and the class {found[0]}, which this "
                              f"library does not implement; of this type it reads {family.architecture}")
    size = hf.get(family.size_key, family.size) if family.size_key else None
    if hf["model_type"].startswith("a2d-") and "block_size" not in hf:
        size = _a2d_block_size(directory)
    blocks = None if size is None else BlockSpec(size, "block_bidirectional")
    if blocks is None and hf.get("use_sliding_window"):
        raise CheckpointError(f"config.json of {hf['model_type']!r} sets use_sliding_window, which its own code "
                              "ignores; set it to false")
    record = {"mask_token_id": hf.get("mask_token_id", family.mask_token_id), "shift": family.shift}
    sampling = _dream_sampling(directory) if hf["model_type"] == "Dream" else dict(family.sampling)
    if blocks is not None:
        record |= blocks_to_record(blocks)
        sampling.pop("block_length", None)
    if sampling:
        record["sampling"] = sampling
    if family.family in hf_moe.FAMILIES:
        hf = hf_moe.from_diffusion(hf)
    kept = _llada_to_llama(hf) if hf["model_type"] == "llada" else {
        name: value for name, value in hf.items()
        if name not in (family.size_key, "attn_implementation", "fuse_cross_entropy")}
    return kept | {"model_type": family.family, "dlm_jax": record}


def check_plain(hf: Mapping[str, Any]) -> None:
    """Raises CheckpointError if a config.json of a family of transformers says that other code computes the model."""
    family, classes = hf.get("model_type"), hf.get("architectures") or []
    what = None
    if "dlm_paradigm" in hf:
        what = f"dlm_paradigm {hf['dlm_paradigm']!r}"
    elif custom := [name for key, name in (hf.get("auto_map") or {}).items() if key.startswith("AutoModel")]:
        what = f"the class {custom[0]} of its own in auto_map"
    elif classes and not _is_plain_class(classes[0], str(family)):
        what = f"the class {classes[0]}"
    if what is not None:
        raise CheckpointError(f"config.json has model_type {family!r} and {what}: a model with code of its own, which "
                              "this library does not implement")


def blocks_to_record(blocks: BlockSpec) -> dict[str, Any]:
    """Returns blocks as entries of a JSON object."""
    record = {"block_size": blocks.size, "clean_attention": blocks.clean_attention}
    for name, default in (("noise", "mask"), ("noised_attention", "bidirectional")):
        if (value := getattr(blocks, name)) != default:
            record[name] = value
    return record


def _is_plain_class(name: str, family: str) -> bool:
    prefix = family.removesuffix("_text").replace("_", "").lower()
    return name == _DIFFUGPT_CLASS or name.lower() in [prefix + kind for kind in _PLAIN_CLASSES]


def _a2d_block_size(directory: Path) -> int | None:
    """Returns the tokens per block of a Tiny-A2D model by its name; None for entire rows."""
    for part in reversed(directory.absolute().parts):
        if kind := re.search("mdlm|bd3lm", part.lower()):
            return 32 if kind[0] == "bd3lm" else None
    raise CheckpointError(f"{directory} does not say whether the model writes in blocks: its name has neither mdlm nor "
                          'bd3lm; add "block_size" to its config.json, 32 for blocks of 32 tokens or null for none')


def _llada_to_llama(hf: dict[str, Any]) -> dict[str, Any]:
    check_implemented(_LLADA_DEFAULTS | hf, _LLADA_BUILT_IN, "config.json of a LLaDA")
    heads = hf.get("n_kv_heads")
    if heads is None:
        heads = 1 if hf.get("multi_query_attention") else hf.get("n_heads")
    width = hf.get("mlp_hidden_size")
    if width is None and isinstance(hf.get("d_model"), int) and isinstance(hf.get("mlp_ratio"), int):
        width = hf["mlp_ratio"] * hf["d_model"]
    return {new: hf[old] for old, new in _LLADA_NAMES.items() if old in hf} | {
        "num_key_value_heads": heads, "intermediate_size": width, "hidden_act": "silu",
        "vocab_size": hf.get("vocab_size") if hf.get("embedding_size") is None else hf["embedding_size"],
    }


def dream_generation(sampling: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of Dream's generation_config.json that sample as `sampling` says, else as this library."""
    policy = {policy: name for name, policy in _DREAM_POLICIES.items()}.get(sampling.get("policy"))
    given = {} if policy is None else sampling
    return {"alg": policy or "maskgit_plus", "steps": given.get("num_steps", 64), "eps": _DREAM_LAST_TIME,
            "temperature": given.get("temperature", 1.0),
            **{name: given[name] for name in ("top_p", "top_k") if name in given}}


def _dream_sampling(directory: Path) -> dict[str, Any]:
    """Returns what Dream's generation_config.json asks for, with the defaults of its class."""
    path = directory / "generation_config.json"
    given = read_json(path) if path.is_file() else {}
    given = {name: value for name, value in given.items() if value is not None}
    for name in ("steps", "temperature", "top_p", "top_k", "eps", "alg_temp"):
        require(given.get(name, 0), name, "a number", path)
    if given.get("alg", "origin") not in _DREAM_POLICIES:
        raise CheckpointError(f"{path} has the alg {given['alg']!r}; known are {', '.join(_DREAM_POLICIES)}")
    check_implemented(given, {"eps": (_DREAM_LAST_TIME,), "alg_temp": (0,)}, path, "; remove it")
    sampling = dict(_DREAM_SAMPLING, policy=_DREAM_POLICIES[given.get("alg", "origin")],
                    num_steps=given.get("steps", _DREAM_SAMPLING["num_steps"]),
                    temperature=float(given.get("temperature", 0.0)))
    return sampling | {name: given[name] for name in ("top_p", "top_k") if name in given}
