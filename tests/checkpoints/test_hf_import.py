"""Imports: files, layouts, sharding, vocabulary, refusals."""

import json
import warnings

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from dlm_jax.attention import AttentionMask
from dlm_jax.checkpoints import hf_import, load_pretrained
from dlm_jax.errors import CheckpointError, ConfigError
from dlm_jax.models import abstract_model
from dlm_jax.parallel import MeshConfig, make_mesh, param_shardings
from tests.checkpoints import families


def assert_same_parameters(a, b):
    jax.tree.map(np.testing.assert_array_equal, nnx.state(a.model), nnx.state(b.model))


def split_over(mesh):
    """Returns the argument `shardings` of load_pretrained."""
    return lambda config: param_shardings(nnx.state(abstract_model(config)), mesh)


def test_shards_and_bin_files(tmp_path):
    model = families.save("llama2-grouped-tied", tmp_path / "one")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    (tmp_path / "bin").mkdir()
    torch.save(model.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    (tmp_path / "bin" / "config.json").write_text((tmp_path / "one" / "config.json").read_text())
    one = load_pretrained(tmp_path / "one")
    assert one.model.config.tie_embeddings
    assert_same_parameters(one, load_pretrained(tmp_path / "shards"))
    assert_same_parameters(one, load_pretrained(tmp_path / "bin"))


@pytest.mark.parametrize("prefixes", [("language_model.model.", ""), ("model.language_model.", "model.")])
def test_language_model_of_a_gemma_that_reads_images(prefixes, tmp_path):
    """As transformers 4 and 5 store it."""
    families.save("gemma3", tmp_path / "text")
    families.save("gemma3", tmp_path / "both")
    text = json.loads((tmp_path / "text" / "config.json").read_text())
    (tmp_path / "both" / "config.json").write_text(json.dumps(
        {"model_type": "gemma3", "text_config": text, "vision_config": {}, "eos_token_id": [1, 106]}))

    def change(state):
        for name in list(state):
            state[prefixes[0] + name.removeprefix("model.")] = state.pop(name)
        state |= {f"{prefixes[1]}{part}.x": torch.zeros(2) for part in ("vision_tower", "multi_modal_projector")}

    families.rewrite(tmp_path / "both", change)
    text, both = (load_pretrained(tmp_path / name) for name in ("text", "both"))
    assert_same_parameters(text, both)
    assert text.model.config == both.model.config and both.hf_config["eos_token_id"] == [1, 106]
    families.set_config(tmp_path / "both", text_config=None)
    with pytest.raises(CheckpointError, match="text_config"):
        load_pretrained(tmp_path / "both")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_becomes_float32(tmp_path, dtype):
    model = families.make("llama2-grouped-tied").to(dtype)
    model.save_pretrained(tmp_path)
    loaded = load_pretrained(tmp_path).model.embed.embedding[...]
    assert loaded.dtype == np.float32
    np.testing.assert_array_equal(loaded, model.get_input_embeddings().weight.detach().float().numpy())


def test_bfloat16_parameters(tmp_path):
    families.save("llama1", tmp_path)
    full = nnx.state(load_pretrained(tmp_path).model)
    half = nnx.state(load_pretrained(tmp_path, param_dtype="bfloat16").model)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.astype(ml_dtypes.bfloat16), b), full, half)


@pytest.mark.parametrize("mesh_config", [MeshConfig(fsdp=4, tensor=2), MeshConfig(data=2, fsdp=2, tensor=2)])
@pytest.mark.parametrize("mask_token", [5, "<|mask|>"])
def test_sharded_import(mesh_config, mask_token, tmp_path, test_data):
    plain = load_pretrained(test_data / "stories260K_hf", mask_token=mask_token)
    sharded = load_pretrained(test_data / "stories260K_hf", mask_token=mask_token,
                              shardings=split_over(make_mesh(mesh_config)))
    assert_same_parameters(plain, sharded)
    kernel = sharded.model.blocks.attention.q.kernel[...]
    assert kernel.sharding.shard_shape(kernel.shape) != kernel.shape


def test_sharded_vocabulary_grows(test_data):
    mesh = jax.make_mesh((3,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:3])

    def by_rows(config):
        return jax.tree.map(lambda leaf: NamedSharding(mesh, PartitionSpec("x" if leaf.shape[0] == 513 else None)),
                            nnx.state(abstract_model(config)))

    plain = load_pretrained(test_data / "stories260K_hf", mask_token="<|mask|>")
    split = load_pretrained(test_data / "stories260K_hf", mask_token="<|mask|>", shardings=by_rows)
    assert split.model.embed.embedding[...].addressable_shards[2].data.shape == (171, 64)
    assert_same_parameters(plain, split)


def test_each_device_reads_only_its_shard(tmp_path, monkeypatch):
    families.save("llama1", tmp_path)
    copied = []
    monkeypatch.setattr(hf_import, "_copy", lambda target, source, name: copied.append(target.size))
    loaded = load_pretrained(tmp_path, shardings=split_over(make_mesh(MeshConfig(fsdp=8))))
    total = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(loaded.model)))
    assert sum(copied) == total  # each value once: no device reads what another holds


def test_hub_gpt2_names_and_buffers(tmp_path):
    model = families.save("gpt2", tmp_path)
    expected = load_pretrained(tmp_path)

    def as_on_the_hub(state):
        for name in list(state):
            state[name.removeprefix("transformer.")] = state.pop(name)
        state |= {"h.0.attn.bias": torch.ones(1, 1, 48, 48), "h.0.attn.masked_bias": torch.tensor(-1e4)}

    families.rewrite(tmp_path, as_on_the_hub)
    assert_same_parameters(expected, load_pretrained(tmp_path))
    assert model.config.tie_word_embeddings


def test_tied_embeddings(tmp_path):
    families.save("gpt2", tmp_path)
    expected, (embedding, head) = load_pretrained(tmp_path), ("transformer.wte.weight", "lm_head.weight")
    families.rewrite(tmp_path, lambda state: state.update({head: state[embedding].clone()}))
    assert_same_parameters(expected, load_pretrained(tmp_path))
    families.rewrite(tmp_path, lambda state: state.pop(embedding))  # the head alone
    assert_same_parameters(expected, load_pretrained(tmp_path))
    families.rewrite(tmp_path, lambda state: state.update({embedding: state[head] - 1}))  # two that differ
    model = load_pretrained(tmp_path).model
    assert not model.config.tie_embeddings
    np.testing.assert_allclose(model.head.kernel[...].T, model.embed.embedding[...] + 1, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("change", "message"), [
    (lambda state: state.pop("model.layers.1.mlp.up_proj.weight"), r"model\.layers\.1\.mlp\.up_proj\.weight"),
    (lambda state: state.update({"model.layers.2.mlp.up_proj.weight": torch.zeros(56, 32)}),
     r"model\.layers\.2\.mlp\.up_proj\.weight"),
    (lambda state: state.update({"model.layers.0.self_attn.k_proj.weight": torch.zeros(16, 32)}),
     r"model\.layers\.0\.self_attn\.k_proj\.weight \(16, 32\) .* \(32, 32\)"),
    (lambda state: state.update({"model.norm.weight": torch.zeros(32, dtype=torch.int32)}),
     r"model\.norm\.weight int32"),
    (lambda state: state.pop("lm_head.weight"), r"lm_head\.weight")])
def test_unfit_tensors_are_named(tmp_path, change, message):
    families.save("llama1", tmp_path)
    families.rewrite(tmp_path, change)
    with pytest.raises(CheckpointError, match=message):
        load_pretrained(tmp_path)


def test_missing_config_or_weights(tmp_path):
    families.save("gpt2", tmp_path)
    for name, message in (("config.json", "config.json"), ("model.safetensors", "model.safetensors")):
        (tmp_path / name).rename(tmp_path / "elsewhere")
        with pytest.raises(CheckpointError, match=message):
            load_pretrained(tmp_path)
        (tmp_path / "elsewhere").rename(tmp_path / name)


def test_recorded_mask_token(tmp_path):
    families.save("gpt2", tmp_path)
    for outside in (97, -1):
        with pytest.raises(CheckpointError, match=str(outside)):
            load_pretrained(tmp_path, mask_token=outside)
    assert load_pretrained(tmp_path).diffusion.mask_token_id is None
    families.set_config(tmp_path, mask_token_id=11)
    assert load_pretrained(tmp_path).diffusion.mask_token_id == 11
    families.set_config(tmp_path, dlm_jax={"mask_token_id": 97, "shift": False})
    with pytest.raises(CheckpointError, match="97"):
        load_pretrained(tmp_path)
    assert load_pretrained(tmp_path, mask_token=3).diffusion.shift is False


@pytest.mark.parametrize(("case", "rows"), [
    ("llama2-grouped-tied", 512), ("llama1", 512), ("llama2-grouped-tied", 520)])
def test_new_mask_token_gets_the_mean_row(case, rows, tmp_path, test_data):
    """In a new row, or in the first spare one of a padded vocabulary."""
    model = families.make(case)
    model.resize_token_embeddings(rows)
    model.save_pretrained(tmp_path)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((test_data / "stories260K_hf" / name).read_bytes())
    before, after = load_pretrained(tmp_path), load_pretrained(tmp_path, mask_token="<|mask|>")
    assert after.new_mask_token and after.diffusion.mask_token_id == after.tokenizer.mask_token_id == 512
    assert after.model.config.vocab_size == max(rows, 513)
    tables = [(before.model.embed.embedding[...], after.model.embed.embedding[...])]
    if not after.model.config.tie_embeddings:
        tables.append((before.model.head.kernel[...].T, after.model.head.kernel[...].T))
    for old, new in tables:
        np.testing.assert_array_equal(np.delete(new, 512, 0), np.delete(old, [512] if rows > 512 else [], 0))
        np.testing.assert_allclose(new[512], old.mean(axis=0), atol=1e-6)


def test_random_weights_follow_the_seed(tmp_path):
    families.save("llama1", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    a, b, c = (load_pretrained(tmp_path, init="random", seed=seed) for seed in (1, 1, 2))
    assert_same_parameters(a, b)
    assert not np.array_equal(a.model.embed.embedding[...], c.model.embed.embedding[...])
    sharded = load_pretrained(tmp_path, init="random", seed=1, shardings=split_over(make_mesh(MeshConfig(fsdp=8))))
    # Equal random bits; XLA may compile the normal's inverse error function differently.
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), nnx.state(a.model), nnx.state(sharded.model))
    with pytest.raises(ConfigError, match="guess"):
        load_pretrained(tmp_path, init="guess")


def test_special_tokens(tmp_path, test_data):
    families.save("llama1", tmp_path)
    families.set_config(tmp_path, eos_token_id=[7, 8])
    loaded = load_pretrained(tmp_path)
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.start_token_id) == (1, 7, 1)
    assert load_pretrained(test_data / "stories260K_hf").eos_token_id == 2


def test_import_is_quiet(tmp_path):
    families.save("gpt2", tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_pretrained(tmp_path)


def test_import_without_second_copy(tmp_path, monkeypatch):
    families.save("llama1", tmp_path)
    addresses, allocate = set(), hf_import.aligned_empty

    def recorded(*arguments):
        array = allocate(*arguments)
        addresses.add(array.ctypes.data)
        return array

    monkeypatch.setattr(hf_import, "aligned_empty", recorded)
    params = jax.tree.leaves(nnx.state(load_pretrained(tmp_path).model))
    assert {leaf.unsafe_buffer_pointer() for leaf in params} == addresses


def to_diffugpt(directory, keep):
    """Rewrites an HF checkpoint in DiffuGPT's layout."""

    def rename(state):
        for name in list(state):
            state["denoise_model." + name.removeprefix("transformer.")] = state.pop(name)
        embedding = state.pop("denoise_model.wte.weight")
        state |= {name: embedding.clone() for name in keep}

    families.rewrite(directory, rename)


@pytest.mark.parametrize("keep", [
    ("embed_tokens.weight",), ("lm_head.weight",), ("embed_tokens.weight", "lm_head.weight")])
def test_diffugpt_layout(tmp_path, keep):
    model = families.save("gpt2", tmp_path)
    to_diffugpt(tmp_path, keep)
    families.set_config(tmp_path, vocab_size=96)  # DiffuGPT resizes its vocabulary and not config.json
    loaded = load_pretrained(tmp_path, mask_token=96)
    assert loaded.model.config.tie_embeddings and loaded.model.config.vocab_size == 97
    tokens = families.tokens()
    logits = loaded.model(tokens, AttentionMask.causal())
    np.testing.assert_allclose(logits, families.torch_logits(model, tokens), atol=1e-4)


@pytest.mark.parametrize(("vocab_size", "mask_token_id"), [(50257, 10541), (50258, 50257), (50000, None)])
def test_diffugpt_mask_token_by_vocabulary_size(tmp_path, vocab_size, mask_token_id):
    model = families.make("gpt2")
    model.resize_token_embeddings(vocab_size)
    model.save_pretrained(tmp_path)
    families.set_config(tmp_path, vocab_size=50257)
    to_diffugpt(tmp_path, ("embed_tokens.weight",))
    assert load_pretrained(tmp_path).diffusion.mask_token_id == mask_token_id


def test_tokenizer_beyond_the_embedding(tmp_path):
    """Only a token that no text has may lack a row."""
    rows = families.save("llama1", tmp_path).config.vocab_size
    words = Tokenizer(WordLevel({f"w{number}": number for number in range(rows)}, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="<pad>")
    tokenizer.save_pretrained(tmp_path)
    assert load_pretrained(tmp_path).tokenizer.pad_token_id == rows
    tokenizer.add_tokens(["word"])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=str(rows)):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_refused(tmp_path, value, dtype):
    families.save("llama1", tmp_path)
    name = "model.layers.1.mlp.down_proj.weight"
    families.rewrite(tmp_path, lambda state: state[name][3, 2].fill_(value))
    with pytest.raises(CheckpointError, match=name):
        load_pretrained(tmp_path, param_dtype=dtype)
