"""config.json of mixtures of experts, and diffusion models of other projects that are such mixtures."""

import copy
import json

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dlm_jax.attention import AttentionMask
from dlm_jax.checkpoints import config_from_hf, config_to_hf, load_pretrained, save_pretrained
from dlm_jax.diffusion import BlockSpec, DiffusionSpec
from dlm_jax.errors import CheckpointError
from dlm_jax.models import ExpertsConfig
from tests.checkpoints import families

MASK = 96
QWEN3_MOE = {"model_type": "qwen3_moe", "vocab_size": 1000, "hidden_size": 64, "num_hidden_layers": 3,
             "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}


@pytest.mark.parametrize("settings", [
    {}, {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 24, "norm_topk_prob": True},
    {"num_local_experts": 16, "router_aux_loss_coef": 0.5, "mlp_only_layers": [], "decoder_sparse_step": 1}])
def test_settings_are_read_as_transformers_reads_them(settings):
    hf, config = AutoConfig.for_model(**copy.deepcopy(QWEN3_MOE | settings)), config_from_hf(QWEN3_MOE | settings)
    assert config.experts == ExpertsConfig(hf.num_experts, hf.num_experts_per_tok, hf.norm_topk_prob,
                                           hf.router_aux_loss_coef)
    assert (config.mlp_size, config.head_dim, config.qk_norm) == (hf.moe_intermediate_size, 16, True)
    written = config_to_hf(config, {}, DiffusionSpec(None), "float32")
    assert config_from_hf(written) == config
    assert AutoConfig.for_model(**written).num_experts == hf.num_experts


@pytest.mark.parametrize(("settings", "named"), [
    ({"decoder_sparse_step": 2}, "decoder_sparse_step"), ({"mlp_only_layers": [0]}, "mlp_only_layers"),
    ({"shared_expert_intermediate_size": 8}, "shared_expert_intermediate_size"), ({"num_experts": 0}, "num_experts"),
    ({"num_experts": 4, "num_experts_per_tok": 5}, "5 of 4"), ({"norm_topk_prob": "yes"}, "norm_topk_prob"),
    ({"scoring_func": "sigmoid"}, "scoring_func"), ({"router_aux_loss_coef": "1"}, "router_aux_loss_coef")])
def test_what_is_not_implemented_is_refused_by_name(settings, named):
    with pytest.raises(CheckpointError, match=named):
        config_from_hf(QWEN3_MOE | settings)


LLADA_MOE = {"model_type": "llada", "architectures": ["LLaDAMoEModelLM"], "expert_intermediate_size": 20,
             "moe_intermediate_size": None, "qk_layernorm": True, "moe_layer_freq": [1, 1],
             "moe_router_enable_expert_bias": False, "moe_router_score_function": "softmax", "routed_scaling_factor": 1,
             "router_num_group": None, "shared_expert_intermediate_size": None, "partial_rotary_factor": 1,
             "auto_map": {"AutoModelForCausalLM": "modeling_lladamoe.LLaDAMoEModelLM"}}
RND1 = {"model_type": "rnd1", "architectures": ["RND1LM"], "rope_scaling": False, "sliding_window": False,
        "moe_backend": "hf", "num_diffusion_steps": 256, "is_causal": False}
SDAR_MOE = {"model_type": "sdar_moe", "architectures": ["SDARMoeForCausalLM"], "block_size": 4}
BIDIRECTIONAL = AttentionMask.bidirectional()
DIFFUSION = {
    "LLaDA-MoE": ("qwen3-moe", LLADA_MOE, False, None),
    "RND1": ("qwen3-moe-norm", RND1, True, None),
    "RND1 by its class": ("qwen3-moe-norm", RND1 | {"model_type": "qwen3_moe"}, True, None),
    "RND1 by llama.cpp's name": ("qwen3-moe-norm", RND1 | {"architectures": ["RND1"]}, True, None),
    "SDAR-MoE": ("qwen3-moe-norm", SDAR_MOE, False, BlockSpec(4, "block_bidirectional")),
}


def logits_under(model, inputs, mask):
    """Logits of a torch model under any mask."""
    positions = np.arange(inputs.shape[1])
    bias = torch.from_numpy(np.where(mask.allowed(positions, positions), 0.0, -np.inf).astype(np.float32))[:, None]
    with torch.no_grad():
        return model(torch.from_numpy(inputs).long(), attention_mask=bias).logits.numpy()


@pytest.mark.parametrize("name", DIFFUSION)
def test_diffusion_models_with_experts(name, tmp_path):
    case, settings, shift, blocks = DIFFUSION[name]
    model = families.save(case, tmp_path / "hf")
    families.set_config(tmp_path / "hf", **settings, mask_token_id=MASK)
    loaded, inputs = load_pretrained(tmp_path / "hf"), families.tokens(length=20)
    assert loaded.diffusion == DiffusionSpec(MASK, shift, blocks)
    mask = BIDIRECTIONAL if blocks is None else blocks.prefill_mask()
    expected = logits_under(model, inputs, mask)
    np.testing.assert_allclose(families.logits(loaded.model, inputs, mask), expected, atol=1e-4)
    save_pretrained(tmp_path / "out", loaded)
    assert load_pretrained(tmp_path / "out").diffusion == loaded.diffusion
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    np.testing.assert_allclose(logits_under(exported, inputs, mask), expected, atol=1e-5)


def test_what_a_config_of_rnd1_omits_is_as_in_its_class(tmp_path):
    tmp_path.joinpath("config.json").write_text(json.dumps(QWEN3_MOE | RND1 | {"mask_token_id": MASK}))
    config = load_pretrained(tmp_path, init="abstract").model.config
    assert config.experts.norm_topk_prob and config.rope_theta == 1e6


@pytest.mark.parametrize(("settings", "named"), [
    ({"qk_layernorm": False}, "qk_layernorm"), ({"routed_scaling_factor": 2.5}, "routed_scaling_factor"),
    ({"moe_layer_freq": [0, 1]}, "moe_layer_freq"), ({"expert_intermediate_size": None}, "moe_intermediate_size"),
    ({"architectures": ["LLaDA2MoeModelLM"]}, "LLaDA2MoeModelLM")])
def test_other_variants_of_llada_moe_are_refused(settings, named, tmp_path):
    tmp_path.joinpath("config.json").write_text(json.dumps(QWEN3_MOE | {"num_experts": 4, "num_experts_per_tok": 2}
                                                           | LLADA_MOE | settings))
    with pytest.raises(CheckpointError, match=named):
        load_pretrained(tmp_path, init="abstract")
