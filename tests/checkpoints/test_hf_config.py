import copy
import dataclasses
import math

import numpy as np
import pytest
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.stablelm.modeling_stablelm import StableLmRotaryEmbedding

from dlm_jax.checkpoints import config_from_hf, config_to_hf
from dlm_jax.checkpoints.hf_config import read_config, recorded_diffusion
from dlm_jax.diffusion import BlockSpec, DiffusionSpec
from dlm_jax.errors import CheckpointError
from dlm_jax.models import RopeScaling
from dlm_jax.models.layers import frequencies

GPT2 = {"model_type": "gpt2", "vocab_size": 50257, "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024}
LLAMA = {"model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "num_hidden_layers": 32,
         "num_attention_heads": 32, "intermediate_size": 11008, "max_position_embeddings": 4096}
GEMMA3 = {"model_type": "gemma3_text"}
QWEN2 = LLAMA | {"model_type": "qwen2", "num_key_value_heads": 4}


def to_hf(config, base=None):
    return config_to_hf(config, base or {}, DiffusionSpec(7), "float32")


def test_gpt2_defaults():
    config = config_from_hf(GPT2)
    assert (config.mlp_size, config.head_dim, config.activation) == (3072, 64, "gelu_tanh")
    assert config.tie_embeddings and config.positions == "learned" and config.attention_dropout == 0.1


def test_llama_default_kv_heads():
    config = config_from_hf(LLAMA)
    assert (config.num_kv_heads, config.head_dim, config.tie_embeddings) == (32, 128, False)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}


@pytest.mark.parametrize(("rope", "scaling"), [
    (LLAMA3, RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)),
    ({"rope_type": "linear", "factor": 2.0}, RopeScaling("linear", 2.0)),
    ({"rope_type": "dynamic", "factor": 2.0}, RopeScaling("dynamic", 2.0)),
    ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024, "beta_fast": 16, "truncate": False},
     RopeScaling("yarn", 4.0, original_max_length=1024, beta_fast=16, attention_factor=0.1 * math.log(4) + 1,
                 truncate=False)),
    ({"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.5, "beta_slow": None},
     RopeScaling("yarn", 4.0, original_max_length=4096, attention_factor=1.5)),
    ({"rope_type": "default"}, None),
])
def test_rope_keys_of_transformers_4_and_5(rope, scaling):
    old = config_from_hf(LLAMA | {"rope_theta": 5e5, "rope_scaling": rope})
    new = config_from_hf(LLAMA | {"rope_parameters": rope | {"rope_theta": 5e5}})
    assert old == new
    assert (old.rope_theta, old.rope_scaling) == (5e5, scaling)


def test_rope_type_key_of_old_transformers():
    assert config_from_hf(LLAMA | {"rope_scaling": {"type": "linear", "factor": 4}}).rope_scaling.factor == 4


LINEAR = {"rope_type": "linear", "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 2048}
STABLELM = LLAMA | {"model_type": "stablelm"}
SHORT_LLAMA3 = {name: value for name, value in LLAMA3.items() if name != "original_max_position_embeddings"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("settings", [
    {"rope_scaling": LINEAR, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    {"rope_scaling": LINEAR, "rope_parameters": {"rope_type": "default"}},
    {"rope_scaling": LLAMA3, "rope_parameters": LINEAR, "rope_theta": 5e5},
    {"rope_scaling": {}, "rope_parameters": LINEAR | {"rope_theta": 7.0}},
    {"rope_scaling": None, "rope_parameters": {"type": "linear", "factor": 2.0, "rope_theta": 7}, "rope_theta": 8.0},
    {"rope_scaling": LINEAR | {"rope_theta": 7.0}, "rope_theta": 8.0},
    {"rope_scaling": SHORT_LLAMA3},
    {"rope_scaling": SHORT_LLAMA3, "original_max_position_embeddings": 1024},
    {"rope_parameters": LLAMA3, "original_max_position_embeddings": 8192},
    {"rope_scaling": YARN, "rope_theta": 5e5}, {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
    {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}},
    {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    {"model_type": "stablelm"}, {"model_type": "stablelm", "partial_rotary_factor": 0.5},
    {"model_type": "stablelm", "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 1.0}},
    {"rope_scaling": LINEAR, "original_max_position_embeddings": 1024},
    {"model_type": "qwen2", "num_key_value_heads": None},
    {"model_type": "qwen3", "num_key_value_heads": 4}, {"attention_dropout": 0, "head_dim": None},
    {"model_type": "gpt2", "n_embd": 64, "n_head": 2, "n_layer": 3, "n_positions": 32, "num_attention_heads": 8,
     "hidden_size": 32, "max_position_embeddings": 16},
])
def test_settings_are_read_as_transformers_reads_them(settings):
    hf = AutoConfig.for_model(**copy.deepcopy(LLAMA | settings))
    config = config_from_hf(LLAMA | settings)
    assert (config.hidden_size, config.num_heads, config.max_length, config.num_layers) == (
        hf.hidden_size, hf.num_attention_heads, hf.max_position_embeddings, hf.num_hidden_layers)
    assert config.num_kv_heads == getattr(hf, "num_key_value_heads", hf.num_attention_heads)
    if config.family != "gpt2":
        hf.standardize_rope_params()  # as its models do
        kind, found = hf.rope_parameters["rope_type"], frequencies(
            int(config.head_dim * config.partial_rotary_factor), config.rope_theta, config.rope_scaling)
        expected, scale = (StableLmRotaryEmbedding.compute_default_rope_parameters(hf) if kind == "default"
                           else ROPE_INIT_FUNCTIONS[kind](hf))
        np.testing.assert_allclose(found, expected, rtol=1e-6)
        assert (1.0 if config.rope_scaling is None else config.rope_scaling.attention_factor) == pytest.approx(scale)
    assert config_from_hf(to_hf(config, LLAMA | settings)) == config


@pytest.mark.parametrize(("settings", "window"), [
    ({"model_type": "mistral", "num_key_value_heads": 8, "sliding_window": 4096}, 4096),
    ({"model_type": "mistral", "num_key_value_heads": 8, "sliding_window": None}, None),
    ({"sliding_window": 32768, "max_window_layers": 28}, None),
    ({"sliding_window": 1024, "use_sliding_window": True, "max_window_layers": 32}, None),
    ({"sliding_window": 1024, "use_sliding_window": True, "max_window_layers": 0}, 1024),
    ({"sliding_window": 1024, "use_sliding_window": True, "layer_types": ["sliding_attention"] * 32}, 1024),
])
def test_sliding_window(settings, window):
    assert config_from_hf(QWEN2 | settings).sliding_window == window


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("settings", [
    {"model_type": "gemma2"}, {"model_type": "gemma2", "sliding_window": 64, "final_logit_softcapping": None}, GEMMA3,
    GEMMA3 | {"num_hidden_layers": 8, "sliding_window_pattern": 3, "rope_theta": 5e4, "rope_local_base_freq": 2e4},
    GEMMA3 | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "sliding_window": 1024, "head_dim": 64},
    GEMMA3 | {"num_hidden_layers": 2, "layer_types": ["full_attention", "sliding_attention"], "rope_parameters": {
        "full_attention": LINEAR | {"rope_theta": 3e5}, "sliding_attention": {"rope_theta": 7e3}}},
    GEMMA3 | {"query_pre_attn_scalar": 168, "attn_logit_softcapping": 20.0, "tie_word_embeddings": False},
])
def test_gemma_as_transformers_reads_it(settings):
    hf = AutoConfig.for_model(**copy.deepcopy(settings))
    config = config_from_hf(settings)
    assert config == config_from_hf(hf.to_dict() | {"model_type": settings["model_type"]}) == config_from_hf(
        to_hf(config) | {"dlm_jax": {}})
    assert [layer not in config.sliding_layers for layer in range(config.num_layers)] == [
        kind == "full_attention" for kind in hf.layer_types]
    assert (config.sliding_window, config.logit_softcap, config.attention_softcap, config.max_length) == (
        hf.sliding_window, hf.final_logit_softcapping, hf.attn_logit_softcapping, hf.max_position_embeddings)
    assert (config.query_pre_attn_scalar or config.head_dim) == hf.query_pre_attn_scalar
    if config.family == "gemma3_text":
        full, sliding = (hf.rope_parameters[f"{kind}_attention"] for kind in ("full", "sliding"))
        assert (config.rope_theta, config.sliding_rope_theta) == (full["rope_theta"], sliding["rope_theta"])
        assert (1.0 if config.rope_scaling is None else config.rope_scaling.factor) == full.get("factor", 1.0)
    AutoConfig.for_model(**to_hf(config))


def test_qwen_with_a_window_in_some_layers():
    config = config_from_hf(QWEN2 | {"use_sliding_window": True, "max_window_layers": 16})
    assert config.sliding_window == 4096 and config.sliding_layers == tuple(range(16, 32))
    hf = AutoConfig.for_model(**to_hf(config))
    assert hf.layer_types == ["full_attention"] * 16 + ["sliding_attention"] * 16


@pytest.mark.parametrize(("config", "named"), [
    ({}, "model_type"),
    ({"model_type": "bert"}, "bert"),
    (GPT2 | {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    (GPT2 | {"scale_attn_weights": False}, "scale_attn_weights"),
    (GPT2 | {"add_cross_attention": True}, "add_cross_attention"),
    (GPT2 | {"n_head": 7}, "7 heads"),
    (GPT2 | {"activation_function": "quick_gelu"}, "quick_gelu"),
    (GPT2 | {"n_layer": None}, "n_layer"),
    (LLAMA | {"quantization_config": {"bits": 4}}, "quantization_config"),
    (LLAMA | {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "longrope"),
    (LLAMA | {"rope_scaling": {"rope_type": "yarn"}}, "factor"),
    (LLAMA | {"rope_scaling": YARN | {"beta_fast": "32"}}, "beta_fast"),
    (LLAMA | {"rope_scaling": YARN | {"truncate": "no"}}, "truncate"),
    (LLAMA | {"rope_scaling": YARN, "original_max_position_embeddings": 1024}, "original_max_position_embeddings"),
    (STABLELM | {"partial_rotary_factor": 1.5}, "partial_rotary_factor"),
    (STABLELM | {"use_parallel_residual": True}, "use_parallel_residual"),
    (STABLELM | {"qk_layernorm": True}, "qk_layernorm"),
    (LLAMA | {"rope_scaling": {"rope_type": "linear"}}, "factor"),
    (LLAMA | {"rope_scaling": LLAMA3, "original_max_position_embeddings": 1024}, "original_max_position_embeddings"),
    (LLAMA | {"rope_scaling": SHORT_LLAMA3, "original_max_position_embeddings": None}, "original_max_position"),
    (LLAMA | {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    (LLAMA | {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    (LLAMA | {"model_type": "mistral"}, "num_key_value_heads"),
    (LLAMA | {"rope_scaling": LINEAR, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope_theta"),
    (LLAMA | {"rope_parameters": {"full_attention": LINEAR}}, "full_attention"),
    (QWEN2 | {"rope_scaling": {"full_attention": LINEAR, "sliding_attention": LINEAR}}, "sliding_attention"),
    (LLAMA | {"rope_scaling": "linear"}, "rope_scaling"), (LLAMA | {"rope_theta": "1e6"}, "rope_theta"),
    (LLAMA | {"rope_parameters": {"rope_theta": None}}, "rope_theta"),
    (LLAMA | {"attention_bias": "false"}, "attention_bias"), (LLAMA | {"rms_norm_eps": "1e-6"}, "rms_norm_eps"),
    (LLAMA | {"tie_word_embeddings": None}, "tie_word_embeddings"), (LLAMA | {"head_dim": 64.0}, "head_dim"),
    (LLAMA | {"compression_config": {"bits": 4}}, "compression_config"),
    (QWEN2 | {"layer_types": ["sliding_attention"] * 32}, "use_sliding_window"),
    (QWEN2 | {"layer_types": ["full_attention"] * 16 + ["sliding_attention"] * 16}, "layer_types"),
    (QWEN2 | {"layer_types": ["full_attention"] * 31}, "layer_types"),
    (QWEN2 | {"layer_types": ["linear_attention"] * 32}, "linear_attention"),
    (GEMMA3 | {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    (GEMMA3 | {"rope_parameters": {"sliding_attention": LINEAR}}, "sliding window"),
    (GEMMA3 | {"rope_parameters": {"full_attention": 1e6}}, "rope_parameters"),
    (GEMMA3 | {"final_logit_softcapping": -1.0}, "final_logit_softcapping"),
    (GEMMA3 | {"query_pre_attn_scalar": None}, "query_pre_attn_scalar"),
    (GEMMA3 | {"sliding_window_pattern": 0}, "sliding_window_pattern"),
    (GEMMA3 | {"sliding_window": None}, "sliding_window"),
    (GEMMA3 | {"num_hidden_layers": "26"}, "num_hidden_layers"),
    ({name: value for name, value in LLAMA.items() if name != "hidden_size"}, "hidden_size"),
])
def test_unsupported_settings_are_refused_by_name(config, named):
    with pytest.raises(CheckpointError, match=named):
        config_from_hf(config)


def test_export_keeps_other_keys_of_the_base():
    base = GPT2 | {"task_specific_params": {"a": 1}, "torch_dtype": "bfloat16", "_name_or_path": "/somewhere"}
    hf = to_hf(config_from_hf(base), base)
    assert hf["task_specific_params"] == {"a": 1}
    assert hf["torch_dtype"] == "float32" and "_name_or_path" not in hf
    assert recorded_diffusion(hf) == DiffusionSpec(7) and hf["mask_token_id"] == 7


@pytest.mark.parametrize("diffusion", [
    DiffusionSpec(None), DiffusionSpec(3, shift=False), DiffusionSpec(3, blocks=BlockSpec(4, "block_bidirectional")),
    DiffusionSpec(3, blocks=BlockSpec(4, noise="random_tokens")),
    DiffusionSpec(3, blocks=BlockSpec(4, noised_attention="causal"))])
def test_diffusion_is_recorded(diffusion):
    assert recorded_diffusion(config_to_hf(config_from_hf(GPT2), GPT2, diffusion, "float32")) == diffusion


@pytest.mark.parametrize("config", [GPT2, LLAMA, QWEN2, STABLELM, LLAMA | {"rope_scaling": YARN}])
def test_round_trip_without_base(config):
    assert config_from_hf(to_hf(config_from_hf(config))) == config_from_hf(config)


def test_inexpressible_architecture_is_refused():
    config = dataclasses.replace(config_from_hf(LLAMA), qkv_bias=True)
    with pytest.raises(CheckpointError, match="qkv_bias"):
        to_hf(config)


def test_missing_or_broken_config_json(tmp_path):
    with pytest.raises(CheckpointError, match="config.json"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="config.json"):
        read_config(tmp_path)
