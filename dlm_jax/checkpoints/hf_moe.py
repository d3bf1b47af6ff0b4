"""The experts of a config.json to and from ExpertsConfig, with the keys and defaults of transformers' Qwen3-MoE."""

from collections.abc import Mapping
from typing import Any

from dlm_jax.checkpoints.settings import check_implemented, require
from dlm_jax.errors import CheckpointError
from dlm_jax.models import ExpertsConfig, ModelConfig

FAMILIES = ("qwen3_moe",)

_DEFAULTS = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": False,
             "router_aux_loss_coef": 0.001}
# What other mixtures have, with the values that change nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "decoder_sparse_step": (1,), "mlp_only_layers": (None, []), "shared_expert_intermediate_size": (None, 0),
    "num_shared_experts": (None, 0), "n_group": (None, 0, 1), "moe_router_enable_expert_bias": (None, False),
    "routed_scaling_factor": (None, 1), "score_function": (None, "softmax"), "scoring_func": (None, "softmax"),
}  # fmt: skip


# Of RND1: what its own repository calls the class, and llama.cpp's converter, which goes by the published config.json.
_RND1_CLASSES = ("RND1LM", "RND1")
# What its class of config.json sets, where a file says nothing.
_RND1_DEFAULTS = {"norm_topk_prob": True}
# Of LLaDA-MoE: the values that its network is read with. Its code ignores norm_topk_prob.
_LLADA_MOE_BUILT_IN: dict[str, tuple[Any, ...]] = {
    "qk_layernorm": (True,), "moe_router_score_function": ("softmax", None), "routed_scaling_factor": (1, None),
    "moe_router_enable_expert_bias": (False, None), "router_num_group": (None,), "router_topk_group": (None,),
    "clip_qkv": (None,), "shared_expert_intermediate_size": (None, 0),
}  # fmt: skip


def with_own_type(hf: dict[str, Any]) -> dict[str, Any]:
    """Returns a config.json whose model_type tells apart what the hub's does not: LLaDA-MoE has LLaDA's, for one."""
    name = (hf.get("architectures") or [None])[0]
    if hf.get("model_type") in ("llada", "lladamoe") and (name == "LLaDAMoEModelLM" or "num_experts" in hf):
        return hf | {"model_type": "llada_moe"}
    return hf | {"model_type": "rnd1", "architectures": ["RND1LM"]} if name in _RND1_CLASSES else hf


def from_diffusion(hf: dict[str, Any]) -> dict[str, Any]:
    """Returns the config.json of a diffusion model with experts in the keys of Qwen3-MoE.

    Raises:
      CheckpointError: a LLaDA-MoE with a setting that this library does not implement.
    """
    if hf["model_type"] == "rnd1":  # it writes false where there is none
        base = _RND1_DEFAULTS if "rope_parameters" in hf else _RND1_DEFAULTS | {"rope_theta": 1e6}
        return base | {name: value for name, value in hf.items()
                       if not (name in ("rope_scaling", "sliding_window") and value is False)}
    if hf["model_type"] != "llada_moe":
        return hf
    check_implemented(hf, _LLADA_MOE_BUILT_IN, "config.json of a LLaDA-MoE")
    if any(kind != 1 for kind in hf.get("moe_layer_freq") or ()):
        raise CheckpointError(f"config.json of a LLaDA-MoE has moe_layer_freq {hf['moe_layer_freq']}, and this library "
                              "reads those with experts in every layer")
    kept = {name: value for name, value in hf.items() if name not in (*_LLADA_MOE_BUILT_IN, "moe_layer_freq")}
    return {"rms_norm_eps": 1e-5} | kept | {"moe_intermediate_size": hf.get("expert_intermediate_size"),
                                            "norm_topk_prob": False}


def fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of ModelConfig that a mixture of experts sets.

    Raises:
      CheckpointError: a setting that this library does not implement, or a value that is none.
    """
    check_implemented(hf, _NEUTRAL, "config.json of a mixture of experts")
    given = _DEFAULTS | {name: hf[name] for name in _DEFAULTS if name in hf}
    given["num_experts"] = hf.get("num_local_experts", given["num_experts"])
    for name in ("num_experts", "num_experts_per_tok", "moe_intermediate_size"):
        require(given[name], name, "a positive integer")
    if given["num_experts_per_tok"] > given["num_experts"]:
        raise CheckpointError(f"config.json sends each token to {given['num_experts_per_tok']} of "
                              f"{given['num_experts']} experts")
    width = given.pop("moe_intermediate_size")
    return {"mlp_size": width, "experts": ExpertsConfig(**given)}


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Returns the keys of a mixture of experts."""
    experts = config.experts
    return {"num_experts": experts.num_experts, "num_experts_per_tok": experts.num_experts_per_tok,
            "moe_intermediate_size": config.mlp_size, "norm_topk_prob": experts.norm_topk_prob,
            "router_aux_loss_coef": experts.router_aux_loss_coef, "decoder_sparse_step": 1, "mlp_only_layers": []}
