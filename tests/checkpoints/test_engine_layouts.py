"""What engines load: every condition of theirs is met, or the model refused with the reason."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import transformers
from flax import nnx
from tokenizers import Tokenizer, models, pre_tokenizers

from dlm_jax.checkpoints import load_pretrained, save_pretrained
from dlm_jax.checkpoints.configuration_sdar import SDARConfig, SDARMoeConfig
from dlm_jax.checkpoints.hf_tensors import read_tensors
from dlm_jax.diffusion import BlockSpec, DiffusionSpec
from dlm_jax.errors import CheckpointError
from tests.checkpoints import families

MASK = 151669
SDAR = DiffusionSpec(MASK, False, BlockSpec(4, "block_bidirectional"))
SIZES = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
             intermediate_size=24, max_position_embeddings=64, bos_token_id=None, eos_token_id=151643,
             pad_token_id=None, tie_word_embeddings=True)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12, norm_topk_prob=True)


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    return make_qwen3(tmp_path_factory.mktemp("qwen3"), transformers.Qwen3Config)


@pytest.fixture(scope="module")
def qwen3_moe(tmp_path_factory):
    return make_qwen3(tmp_path_factory.mktemp("qwen3_moe"), transformers.Qwen3MoeConfig, **EXPERTS)


def make_qwen3(folder, config_class, **settings):
    """A tiny tied Qwen3 with as many rows as the real one, and a tokenizer whose ids end where the real one's do."""
    config = config_class(vocab_size=151936, **SIZES, **settings, rope_parameters=dict(
        rope_type="default", rope_theta=1e6))
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    write_tokenizer(folder, {"a": 0, "b": 1, "<|endoftext|>": 151643, "</think>": MASK - 1})
    return dataclasses.replace(load_pretrained(folder, mask_token="<|mask|>"), diffusion=SDAR)


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen2")
    families.save("qwen2", folder)
    write_tokenizer(folder, {"<|endoftext|>": 2} | {chr(97 + i): 3 + i for i in range(26)} | {"z" * 9: 95})
    return load_pretrained(folder, mask_token="<|mask|>")


def write_tokenizer(folder, vocab):
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=next(iter(vocab))))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer,
                                         eos_token="<|endoftext|>").save_pretrained(folder)


def assert_same_network(found, expected):
    """The same but for the head, which is no longer tied."""
    assert dataclasses.replace(found.model.config, tie_embeddings=True) == expected.model.config
    state = nnx.state(expected.model)
    jax.tree.map(np.testing.assert_array_equal, {k: nnx.state(found.model)[k] for k in state}, dict(state))
    np.testing.assert_array_equal(found.model.head.kernel[...], expected.model.embed.embedding[...].T)


def test_sdar_layout(qwen3, tmp_path):
    save_pretrained(tmp_path, qwen3, layout="sdar", dtype="float32")
    config = json.loads((tmp_path / "config.json").read_text())
    expected = dict(model_type="sdar", architectures=["SDARForCausalLM"], block_size=4, mask_token_id=MASK,
                    tie_word_embeddings=False, rope_theta=1e6, rope_scaling=None, head_dim=8, attention_bias=False,
                    auto_map={"AutoConfig": "configuration_sdar.SDARConfig"})
    assert expected.items() <= config.items() and "rope_parameters" not in config
    assert "lm_head.weight" in read_tensors(tmp_path)
    read = SDARConfig.from_pretrained(tmp_path)  # the file beside the weights
    assert (tmp_path / "configuration_sdar.py").is_file()
    assert (read.rope_theta, read.rope_scaling, read.block_size, read.num_key_value_heads) == (1e6, None, 4, 1)
    assert not read.tie_word_embeddings and read.architectures == ["SDARForCausalLM"]
    assert (tmp_path / "sglang.yaml").read_text() == "block_size: 4\nthreshold: 0.9\n"
    card = (tmp_path / "README.md").read_text()
    assert all(name in card for name in ("sglang.launch_server", "lmdeploy", "jetengine", f"mask_token_id={MASK}"))
    again = load_pretrained(tmp_path)
    assert again.diffusion == dataclasses.replace(qwen3.diffusion, missing_ids=again.diffusion.missing_ids)
    assert again.tokenizer.mask_token_id == MASK
    assert_same_network(again, qwen3)


def test_sdar_layout_of_experts(qwen3_moe, tmp_path):
    save_pretrained(tmp_path, qwen3_moe, layout="sdar", dtype="float32")
    read = SDARMoeConfig.from_pretrained(tmp_path)
    assert (read.model_type, read.architectures) == ("sdar_moe", ["SDARMoeForCausalLM"])
    assert read.auto_map == {"AutoConfig": "configuration_sdar.SDARMoeConfig"}
    assert EXPERTS.items() <= read.to_dict().items() and (read.rope_theta, read.mask_token_id) == (1e6, MASK)
    assert transformers.AutoConfig.from_pretrained(tmp_path, trust_remote_code=True).num_experts == 4
    assert "model.layers.0.mlp.experts.3.down_proj.weight" in read_tensors(tmp_path)
    again = load_pretrained(tmp_path)
    assert again.diffusion == dataclasses.replace(qwen3_moe.diffusion, missing_ids=again.diffusion.missing_ids)
    assert_same_network(again, qwen3_moe)


def test_dream_layout(qwen2, tmp_path):
    save_pretrained(tmp_path / "out", qwen2, layout="dream")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert dict(model_type="Dream", architectures=["DreamModel"], mask_token_id=96, rope_theta=10000.0,
                tie_word_embeddings=False).items() <= config.items()
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert dict(alg="maskgit_plus", steps=64, eps=1e-3, mask_token_id=96, eos_token_id=2).items() <= generation.items()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "convert_hf_to_gguf.py" in card and "--temp 0.2\n" in card  # at 0 llama-diffusion-cli samples at 1
    again = load_pretrained(tmp_path / "out")
    assert (again.model.config, again.diffusion) == (qwen2.model.config, qwen2.diffusion)
    assert again.sampling == dict(policy="confidence", num_steps=64, step_schedule="dream", temperature=1.0)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(again.model), nnx.state(qwen2.model))
    save_pretrained(tmp_path / "again", again, layout="dream")  # and what samples so keeps it
    assert load_pretrained(tmp_path / "again").sampling == again.sampling


@pytest.mark.parametrize(("changes", "named"), [
    (dict(mask_token_id=5), "151669"), (dict(shift=True), "objective.shift"),
    (dict(blocks=None), "objective.name=block_diffusion"), (dict(blocks=BlockSpec(4)), "objective.clean_attention"),
])
def test_models_that_sdar_does_not_describe(changes, named, qwen3, tmp_path):
    pretrained = dataclasses.replace(qwen3, diffusion=dataclasses.replace(SDAR, **changes))
    with pytest.raises(CheckpointError, match=named) as caught:
        save_pretrained(tmp_path / "out", pretrained, layout="sdar")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(("changes", "named"), [
    (dict(mask_token_id=None), "mask token"), (dict(shift=False), "shift"), (dict(blocks=BlockSpec(4)), "blocks")])
def test_models_that_dream_does_not_describe(changes, named, qwen2, tmp_path):
    pretrained = dataclasses.replace(qwen2, diffusion=dataclasses.replace(qwen2.diffusion, **changes))
    with pytest.raises(CheckpointError, match=named):
        save_pretrained(tmp_path / "out", pretrained, layout="dream")


def test_networks_that_engines_lack(qwen2, qwen3, tmp_path):
    window = families.save("qwen2-window", tmp_path / "window") and load_pretrained(tmp_path / "window", mask_token=96)
    for pretrained, layout, named in (
            (dataclasses.replace(qwen2, diffusion=SDAR), "sdar", "qwen3"), (qwen3, "dream", "qwen2"),
            (window, "dream", "sliding window"), (window, "dream", "tokenizer")):
        with pytest.raises(CheckpointError, match=named):
            save_pretrained(tmp_path / "out", pretrained, layout=layout)


def test_recipe_trains_what_is_served():
    from dlm_jax.cli.config import load_recipe

    objective = load_recipe("sdar_qwen3_0_6b").objective
    assert (objective.name, objective.shift, objective.clean_attention, objective.block_size) == (
        "block_diffusion", False, "block_bidirectional", 4)
