"""What import accepts, what it refuses, and where it puts things."""

import subprocess
import sys
import warnings

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dlm_jax.checkpoints import hf_import, load_pretrained
from dlm_jax.errors import CheckpointError, ConfigError
from dlm_jax.models import abstract_model
from dlm_jax.parallel import MeshConfig, make_mesh, param_shardings
from tests.checkpoints import families


def assert_same_parameters(a, b):
    jax.tree.map(np.testing.assert_array_equal, nnx.state(a.model), nnx.state(b.model))


def split_over(mesh):
    """What load_pretrained takes as `shardings`."""
    return lambda config: param_shardings(nnx.state(abstract_model(config)), mesh)


def test_shards_and_bin_load_the_same_parameters(tmp_path):
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_sources_become_float32_exactly(tmp_path, dtype):
    model = families.make("llama2-grouped-tied").to(dtype)
    model.save_pretrained(tmp_path)
    loaded = load_pretrained(tmp_path).model.embed.embedding[...]
    assert loaded.dtype == np.float32
    np.testing.assert_array_equal(loaded, model.get_input_embeddings().weight.detach().float().numpy())


def test_parameters_in_bfloat16(tmp_path):
    families.save("llama1", tmp_path)
    full = nnx.state(load_pretrained(tmp_path).model)
    half = nnx.state(load_pretrained(tmp_path, param_dtype="bfloat16").model)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.astype(ml_dtypes.bfloat16), b), full, half)


@pytest.mark.parametrize("mesh_config", [MeshConfig(fsdp=4, tensor=2), MeshConfig(data=2, fsdp=2, tensor=2)])
@pytest.mark.parametrize("mask_token", [5, "<|mask|>"])
def test_sharded_import_equals_the_plain_one(mesh_config, mask_token, tmp_path, test_data):
    plain = load_pretrained(test_data / "stories260K_hf", mask_token=mask_token)
    sharded = load_pretrained(test_data / "stories260K_hf", mask_token=mask_token,
                              shardings=split_over(make_mesh(mesh_config)))
    assert_same_parameters(plain, sharded)
    kernel = sharded.model.blocks.attention.q.kernel[...]
    assert kernel.sharding.shard_shape(kernel.shape) != kernel.shape


def test_a_vocabulary_that_grows_while_it_is_split(test_data):
    mesh = jax.make_mesh((3,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:3])

    def by_rows(config):
        return jax.tree.map(lambda leaf: NamedSharding(mesh, PartitionSpec("x" if leaf.shape[0] == 513 else None)),
                            nnx.state(abstract_model(config)))

    plain = load_pretrained(test_data / "stories260K_hf", mask_token="<|mask|>")
    split = load_pretrained(test_data / "stories260K_hf", mask_token="<|mask|>", shardings=by_rows)
    assert split.model.embed.embedding[...].addressable_shards[2].data.shape == (171, 64)
    assert_same_parameters(plain, split)


def test_each_device_reads_only_its_part(tmp_path, monkeypatch):
    families.save("llama1", tmp_path)
    copied = []
    monkeypatch.setattr(hf_import, "_copy", lambda target, source: copied.append(target.size))
    loaded = load_pretrained(tmp_path, shardings=split_over(make_mesh(MeshConfig(fsdp=8))))
    total = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(loaded.model)))
    assert sum(copied) == total  # each value once: no device reads what another holds


def test_gpt2_of_the_hub_has_no_prefix_and_stores_causal_masks(tmp_path):
    model = families.save("gpt2", tmp_path)
    expected = load_pretrained(tmp_path)

    def as_on_the_hub(state):
        for name in list(state):
            state[name.removeprefix("transformer.")] = state.pop(name)
        state |= {"h.0.attn.bias": torch.ones(1, 1, 48, 48), "h.0.attn.masked_bias": torch.tensor(-1e4)}

    families.rewrite(tmp_path, as_on_the_hub)
    assert_same_parameters(expected, load_pretrained(tmp_path))
    assert model.config.tie_word_embeddings


def test_both_embeddings_present_and_equal_are_tied(tmp_path):
    families.save("gpt2", tmp_path)
    expected = load_pretrained(tmp_path)
    families.rewrite(tmp_path, lambda state: state.update({"lm_head.weight": state["transformer.wte.weight"].clone()}))
    assert_same_parameters(expected, load_pretrained(tmp_path))


def test_both_embeddings_present_and_different_are_untied(tmp_path):
    families.save("gpt2", tmp_path)
    families.rewrite(tmp_path, lambda state: state.update({"lm_head.weight": state["transformer.wte.weight"] + 1}))
    model = load_pretrained(tmp_path).model
    assert not model.config.tie_embeddings
    np.testing.assert_allclose(model.head.kernel[...].T, model.embed.embedding[...] + 1, rtol=1e-6)


def test_a_tied_model_that_stores_only_its_head(tmp_path):
    families.save("gpt2", tmp_path)
    expected = load_pretrained(tmp_path)
    families.rewrite(tmp_path, lambda state: state.update({"lm_head.weight": state.pop("transformer.wte.weight")}))
    assert_same_parameters(expected, load_pretrained(tmp_path))


def drop(state):
    del state["model.layers.1.mlp.up_proj.weight"]


def add(state):
    state["model.layers.2.mlp.up_proj.weight"] = torch.zeros(56, 32)


def reshape(state):
    state["model.layers.0.self_attn.k_proj.weight"] = torch.zeros(16, 32)


def integers(state):
    state["model.norm.weight"] = torch.zeros(32, dtype=torch.int32)


def untied_without_head(state):
    del state["lm_head.weight"]


@pytest.mark.parametrize(("change", "said"), [
    (drop, r"lacks: model\.layers\.1\.mlp\.up_proj\.weight"),
    (add, r"unknown tensors: model\.layers\.2\.mlp\.up_proj\.weight"),
    (reshape, r"model\.layers\.0\.self_attn\.k_proj\.weight \(16, 32\) instead of \(32, 32\)"),
    (integers, r"model\.norm\.weight int32"),
    (untied_without_head, r"lacks: lm_head\.weight"),
])
def test_tensors_that_do_not_fit_are_named(tmp_path, change, said):
    families.save("llama1", tmp_path)
    families.rewrite(tmp_path, change)
    with pytest.raises(CheckpointError, match=said):
        load_pretrained(tmp_path)


def test_weights_without_config_and_config_without_weights(tmp_path):
    families.save("gpt2", tmp_path)
    (tmp_path / "config.json").rename(tmp_path / "elsewhere.json")
    with pytest.raises(CheckpointError, match="no config.json"):
        load_pretrained(tmp_path)
    (tmp_path / "elsewhere.json").rename(tmp_path / "config.json")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds no weights"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("mask_token", [97, -1])
def test_a_mask_id_outside_the_vocabulary(tmp_path, mask_token):
    families.save("gpt2", tmp_path)
    with pytest.raises(CheckpointError, match="outside the vocabulary of 97"):
        load_pretrained(tmp_path, mask_token=mask_token)


def test_a_recorded_mask_id_is_found_and_checked(tmp_path):
    families.save("gpt2", tmp_path)
    assert load_pretrained(tmp_path).mask_token_id is None
    families.set_config(tmp_path, mask_token_id=11)
    assert load_pretrained(tmp_path).mask_token_id == 11
    families.set_config(tmp_path, dlm_jax={"mask_token_id": 97, "shift": False})
    with pytest.raises(CheckpointError, match="outside the vocabulary"):
        load_pretrained(tmp_path)
    assert load_pretrained(tmp_path, mask_token=3).shift is False


@pytest.mark.parametrize("case", ["llama2-grouped-tied", "llama1"])
def test_a_new_mask_token_gets_the_mean_row(case, tmp_path, test_data):
    model = families.make(case)
    model.resize_token_embeddings(512)
    model.save_pretrained(tmp_path)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((test_data / "stories260K_hf" / name).read_bytes())
    before, after = load_pretrained(tmp_path), load_pretrained(tmp_path, mask_token="<|mask|>")
    assert after.mask_token_id == after.tokenizer.mask_token_id == 512
    assert after.model.config.vocab_size == len(after.tokenizer) == 513
    tables = [(before.model.embed.embedding[...], after.model.embed.embedding[...])]
    if not after.model.config.tie_embeddings:
        tables.append((before.model.head.kernel[...].T, after.model.head.kernel[...].T))
    for old, new in tables:
        np.testing.assert_array_equal(new[:-1], old)
        np.testing.assert_allclose(new[-1], old.mean(axis=0), atol=1e-6)


def test_a_new_mask_token_takes_a_spare_row_where_there_is_one(tmp_path, test_data):
    model = families.make("llama2-grouped-tied")
    model.resize_token_embeddings(520)
    model.save_pretrained(tmp_path)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((test_data / "stories260K_hf" / name).read_bytes())
    before, after = load_pretrained(tmp_path), load_pretrained(tmp_path, mask_token="<|mask|>")
    old, new = before.model.embed.embedding[...], after.model.embed.embedding[...]
    assert after.mask_token_id == 512 and new.shape == old.shape
    np.testing.assert_array_equal(np.delete(new, 512, 0), np.delete(old, 512, 0))
    np.testing.assert_allclose(new[512], old.mean(axis=0), atol=1e-6)


def test_random_weights_need_no_checkpoint_and_follow_the_seed(tmp_path):
    families.save("llama1", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    a, b, c = (load_pretrained(tmp_path, init="random", seed=seed) for seed in (1, 1, 2))
    assert_same_parameters(a, b)
    assert not np.array_equal(a.model.embed.embedding[...], c.model.embed.embedding[...])
    sharded = load_pretrained(tmp_path, init="random", seed=1, shardings=split_over(make_mesh(MeshConfig(fsdp=8))))
    # The same bits drawn; the normal's inverse error function may be compiled otherwise (jax 0.12).
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), nnx.state(a.model), nnx.state(sharded.model))
    with pytest.raises(ConfigError, match="init 'guess'"):
        load_pretrained(tmp_path, init="guess")


def test_special_tokens_come_from_tokenizer_or_config(tmp_path, test_data):
    families.save("llama1", tmp_path)
    families.set_config(tmp_path, eos_token_id=[7, 8])
    loaded = load_pretrained(tmp_path)
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (1, 7, 7)
    assert load_pretrained(test_data / "stories260K_hf").eos_token_id == 2


def test_import_is_quiet(tmp_path):
    families.save("gpt2", tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_pretrained(tmp_path)


def test_the_arrays_that_are_read_into_are_the_parameters(tmp_path, monkeypatch):
    families.save("llama1", tmp_path)
    addresses, allocate = set(), hf_import.aligned_empty

    def recorded(*arguments):
        array = allocate(*arguments)
        addresses.add(array.ctypes.data)
        return array

    monkeypatch.setattr(hf_import, "aligned_empty", recorded)
    params = jax.tree.leaves(nnx.state(load_pretrained(tmp_path).model))
    assert {leaf.unsafe_buffer_pointer() for leaf in params} == addresses  # on CPU no second copy is made


def test_safetensors_and_tokenizer_load_without_torch(test_data):
    program = ("import sys; sys.modules['torch'] = None\n"
               "from dlm_jax.checkpoints import load_pretrained\n"
               f"print(load_pretrained({str(test_data / 'stories260K_hf')!r}).tokenizer.encode('Once'))")
    run = subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", program], capture_output=True, text=True)
    assert run.stdout == "[1, 403]\n" and run.stderr == ""
