"""Exports: layouts, dtypes, shards, refusals, and atomicity."""

import dataclasses
import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from flax import nnx

from dlm_jax.checkpoints import hf_export, load_pretrained, save_pretrained
from dlm_jax.checkpoints.hf_tensors import read_tensors
from dlm_jax.diffusion import DiffusionSpec
from dlm_jax.errors import CheckpointError, ConfigError
from dlm_jax.parallel import MeshConfig, make_mesh, param_shardings
from tests.checkpoints import families


@pytest.fixture
def stories(test_data):
    return load_pretrained(test_data / "stories260K_hf", mask_token="<|mask|>")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory, test_data):
    """A tiny GPT-2 with the real GPT-2 tokenizer and a new mask token."""
    folder, model = tmp_path_factory.mktemp("gpt2"), families.make("gpt2")
    model.resize_token_embeddings(50257)
    model.save_pretrained(folder)
    shutil.copy(test_data / "gpt2_bpe" / "encoder.json", folder / "vocab.json")
    shutil.copy(test_data / "gpt2_bpe" / "vocab.bpe", folder / "merges.txt")
    return load_pretrained(folder, mask_token="<|mask|>")


def assert_same_model(a, b):
    assert a.model.config == b.model.config
    assert (a.diffusion, a.bos_token_id, a.eos_token_id) == (b.diffusion, b.bos_token_id, b.eos_token_id)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(a.model), nnx.state(b.model))


def test_export_records_everything(stories, tmp_path):
    stories = dataclasses.replace(stories, diffusion=DiffusionSpec(512, shift=False),
                                  recipe={"model.source": "parent", "num_steps": 7})
    save_pretrained(tmp_path / "out", stories)
    again = load_pretrained(tmp_path / "out")
    assert_same_model(stories, again)
    assert again.tokenizer.mask_token_id == 512 and again.recipe == stories.recipe
    text = "Once upon a time, there was a little girl."
    assert again.tokenizer.encode(text) == stories.tokenizer.encode(text)
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == 2
    card = (tmp_path / "out" / "README.md").read_text()
    assert '"num_steps": 7' in card and "| base | parent |" in card and "| mask token id | 512 |" in card


def test_shards_load_in_transformers(stories, tmp_path):
    save_pretrained(tmp_path / "out", stories, max_shard_bytes=200_000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 3
    assert_same_model(stories, load_pretrained(tmp_path / "out"))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    np.testing.assert_array_equal(model.get_input_embeddings().weight.detach(), stories.model.embed.embedding[...])


@pytest.mark.parametrize(("dtype", "stored"), [("bfloat16", ml_dtypes.bfloat16), ("float16", np.float16)])
def test_half_precision(stories, tmp_path, dtype, stored):
    save_pretrained(tmp_path / "out", stories, dtype=dtype)
    assert {tensor.dtype for tensor in read_tensors(tmp_path / "out").values()} == {np.dtype(stored)}
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == getattr(torch, dtype)
    expected = np.asarray(stories.model.embed.embedding[...]).astype(stored).astype(np.float32)
    np.testing.assert_array_equal(model.get_input_embeddings().weight.detach().float(), expected)


def test_float16_overflow_leaves_nothing(stories, tmp_path):
    scale = stories.model.final_norm.scale
    scale[...] = scale[...].at[0].set(1e6)
    with pytest.raises(CheckpointError, match="model.norm.weight"):
        save_pretrained(tmp_path / "out", stories, dtype="float16")
    assert list(tmp_path.iterdir()) == []


def test_only_an_earlier_export_is_replaced(stories, tmp_path):
    save_pretrained(tmp_path / "out", stories, max_shard_bytes=200_000)
    save_pretrained(tmp_path / "out", stories)
    assert not list((tmp_path / "out").glob("model-*.safetensors"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(CheckpointError, match="mine"):
        save_pretrained(tmp_path / "mine", stories)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "out"]


def test_failure_keeps_the_earlier_export(stories, tmp_path, monkeypatch):
    save_pretrained(tmp_path / "out", stories)
    monkeypatch.setattr(hf_export, "model_card", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_pretrained(tmp_path / "out", stories)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert_same_model(stories, load_pretrained(tmp_path / "out"))


def test_sharded_parameters_export_equal_bytes(stories, tmp_path, test_data):
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    shardings = param_shardings(nnx.state(stories.model), mesh)
    model = nnx.merge(nnx.graphdef(stories.model), jax.device_put(nnx.state(stories.model), shardings))
    save_pretrained(tmp_path / "plain", stories)
    save_pretrained(tmp_path / "sharded", dataclasses.replace(stories, model=model))
    plain, sharded = (tmp_path / name / "model.safetensors" for name in ("plain", "sharded"))
    assert plain.read_bytes() == sharded.read_bytes()


def test_diffugpt_layout(gpt2, tmp_path):
    save_pretrained(tmp_path / "out", gpt2, layout="diffugpt")
    stored = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    outside_blocks = {name for name in stored if not name.startswith("denoise_model.h.")}
    assert outside_blocks == {"embed_tokens.weight", "denoise_model.wpe.weight", "denoise_model.ln_f.weight",
                              "denoise_model.ln_f.bias", "lm_head.weight"}
    np.testing.assert_array_equal(stored["embed_tokens.weight"], stored["lm_head.weight"])
    assert stored["denoise_model.h.1.attn.c_attn.weight"].shape == (32, 96)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["task_specific_params"]["text-generation"]["max_length"] == 48
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").mask_token_id == 50257
    # the only spelling that transformers 4.44 reads, the reference implementation's version
    assert json.loads((tmp_path / "out" / "tokenizer.json").read_text())["model"]["merges"][0] == "Ġ t"
    assert_same_model(gpt2, load_pretrained(tmp_path / "out"))


def test_diffugpt_layout_tokenizers(gpt2, tmp_path):
    existing = load_pretrained(gpt2.source, mask_token=10541)
    save_pretrained(tmp_path / "out", existing, layout="diffugpt")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").mask_token_id == 10541
    assert existing.tokenizer.mask_token is None
    generic = transformers.PreTrainedTokenizerFast(tokenizer_object=gpt2.tokenizer.backend_tokenizer,
                                                   bos_token="<|endoftext|>")
    save_pretrained(tmp_path / "out", dataclasses.replace(gpt2, tokenizer=generic), layout="diffugpt")
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"  # known to transformers 4.44
    assert load_pretrained(tmp_path / "out").tokenizer.mask_token_id == 50257


def test_unsupported_exports_are_refused(stories, tmp_path):
    families.save("gpt2", tmp_path / "base")
    bare = load_pretrained(tmp_path / "base")
    for pretrained, settings, error, message in (
            (stories, {"layout": "diffugpt"}, CheckpointError, "diffugpt"),
            (bare, {"layout": "diffugpt"}, CheckpointError, "mask token"),
            (stories, {"layout": "gguf"}, ConfigError, "gguf"), (stories, {"dtype": "int8"}, ConfigError, "int8")):
        with pytest.raises(error, match=message):
            save_pretrained(tmp_path / "out", pretrained, **settings)
