"""Runs with LoRA as sources: their base, merging, stacks of adapters, and refusals."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dlm_jax.attention import AttentionMask
from dlm_jax.checkpoints import load_pretrained, resolve_lora, save_pretrained
from dlm_jax.checkpoints.workdir import LoRABase
from dlm_jax.errors import CheckpointError, ConfigError
from dlm_jax.models import fingerprint
from dlm_jax.models.lora import dequantize, quantize_kernel
from dlm_jax.parallel import MeshConfig, make_mesh, param_shardings
from dlm_jax.pipeline import DiffusionLM
from dlm_jax.training import read_records, train
from dlm_jax.training.config import LoRASettings, ModelSource, config_changes, flat_dict
from tests.checkpoints import families
from tests.training.conftest import changed, checkpoint_arrays
from tests.training.test_compilations import compilations

TOKENS = np.arange(12)[None] % 11
SMALL_LORA = LoRASettings(rank=1, targets=("c_attn",), frozen_dtype="float32")


@pytest.fixture(scope="module")
def lora_config(short_config, pretrained):
    return dataclasses.replace(short_config, model=ModelSource(source=str(pretrained), mask_token=10),
                               lora=LoRASettings(rank=2, dropout=0.1))


@pytest.fixture(scope="module")
def run_and_programs(lora_config, tmp_path_factory):
    workdir, programs = tmp_path_factory.mktemp("runs") / "run", []
    with compilations(programs):
        train(lora_config, workdir)
    return workdir, programs


@pytest.fixture(scope="module")
def lora_run(run_and_programs):
    return run_and_programs[0]


def continued(config, source, **settings):
    """Returns a run of one step that starts from `source`."""
    return dataclasses.replace(config, num_steps=1, model=ModelSource(source=str(source)), **settings)


def logits(pretrained):
    return families.logits(pretrained.model, TOKENS, AttentionMask.bidirectional())


def assert_same_checkpoint(workdir, other, step):
    expected, found = (checkpoint_arrays(path, step) for path in (workdir, other))
    assert [name for name in expected if not np.array_equal(expected[name], found[name])] == []


def assert_only_attention_differs(a, b):
    blocks, other = a.model.blocks, b.model.blocks
    np.testing.assert_array_equal(blocks.mlp.up.kernel[...], other.mlp.up.kernel[...])
    assert not np.array_equal(blocks.attention.q.kernel[...], other.attention.q.kernel[...])


def test_checkpoints_hold_only_trained_parameters_and_resume_exactly(lora_run, lora_config, tmp_path):
    shutil.copytree(lora_run, tmp_path / "run", ignore=shutil.ignore_patterns("4"))
    train(lora_config, tmp_path / "run")
    assert_same_checkpoint(lora_run, tmp_path / "run", 4)
    arrays = checkpoint_arrays(lora_run, 4)
    assert sum(name.startswith("params/") for name in arrays) == 12
    assert all(".factors." in name for name in arrays if arrays[name].ndim)
    assert read_records(lora_run, "train")[-1]["loss"] == read_records(tmp_path / "run", "train")[-1]["loss"]


def test_lora_step_is_compiled_once(run_and_programs):
    assert run_and_programs[1].count(("compile", "jit(train_step)")) == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_quantized_base(kind, lora_config, pretrained, tmp_path):
    """Resuming is exact, merging keeps the logits, and the fingerprint is of the base before quantization."""
    run = changed(lora_config, "lora.frozen_dtype", kind)
    train(run, tmp_path / "once")
    shutil.copytree(tmp_path / "once", tmp_path / "resumed", ignore=shutil.ignore_patterns("4"))
    train(run, tmp_path / "resumed")
    assert_same_checkpoint(tmp_path / "once", tmp_path / "resumed", 4)
    merged, beside = load_pretrained(tmp_path / "once"), load_pretrained(tmp_path / "once", merge=False)
    assert beside.model.lora.frozen_dtype == kind and beside.model.blocks.mlp.up.kernel_scale is not None
    np.testing.assert_allclose(logits(merged), logits(beside), atol=1e-5)
    lm = DiffusionLM.from_pretrained(tmp_path / "once", mesh=MeshConfig(fsdp=4, data=2), merge=False)
    np.testing.assert_allclose(logits(lm), logits(merged), atol=1e-5)
    base = load_pretrained(pretrained, mask_token=10)
    kernel = base.model.blocks.mlp.up.kernel[...].astype(jnp.bfloat16)
    param = nnx.Param(kernel, axes=("layers", "embed", "mlp"))
    exact = dequantize(*(array[...] for array in quantize_kernel(param, kind)))
    factors = beside.model.blocks.mlp.up.factors
    product = 2.0 * np.stack([x @ y for x, y in zip(factors.a[...], factors.b[...], strict=True)])
    np.testing.assert_allclose(merged.model.blocks.mlp.up.kernel[...], exact + product, atol=1e-6)
    kernel = base.model.blocks.mlp.up.kernel
    kernel[...] = kernel[...].at[1, 3, 2].multiply(1.01)  # which may well be the same code
    save_pretrained(tmp_path / "other", base)
    families.set_config(tmp_path / "once", "adapter.json", source=str(tmp_path / "other"))
    with pytest.raises(CheckpointError, match="other weights"):
        load_pretrained(tmp_path / "once")


@pytest.mark.slow
def test_merging_dora_keeps_the_logits(lora_config, pretrained, tmp_path):
    train(changed(changed(lora_config, "lora.dora", True), "num_steps", 2), tmp_path)
    merged, beside = load_pretrained(tmp_path), load_pretrained(tmp_path, merge=False)
    np.testing.assert_allclose(logits(merged), logits(beside), atol=1e-5)
    assert np.abs(logits(merged) - logits(load_pretrained(pretrained, mask_token=10))).max() > 1e-3
    stored = checkpoint_arrays(tmp_path, 2)
    assert sum(name.startswith("params/") and name.endswith("magnitude") for name in stored) == 6
    save_pretrained(tmp_path / "adapter", beside, layout="peft")
    np.testing.assert_allclose(logits(load_pretrained(tmp_path / "adapter")), logits(merged), atol=2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_run_on_a_run_with_quantized_base(kind, lora_config, tmp_path):
    run = changed(changed(lora_config, "lora.frozen_dtype", kind), "num_steps", 2)
    train(run, tmp_path / "run")
    child = continued(run, tmp_path / "run")
    train(child, tmp_path / "child")
    train(changed(child, "num_steps", 2), tmp_path / "child")
    assert load_pretrained(tmp_path / "child").recipe["lora.frozen_dtype"] == kind


@pytest.mark.slow
def test_full_run_as_quantized_base(short_config, lora_config, tmp_path):
    full_run = dataclasses.replace(short_config, num_steps=1)
    train(full_run, tmp_path / "base")
    child = continued(changed(lora_config, "lora.frozen_dtype", "nf4"), tmp_path / "base")
    train(child, tmp_path / "child")
    train(changed(child, "num_steps", 2), tmp_path / "child")
    load_pretrained(tmp_path / "child")
    shutil.rmtree(tmp_path / "base")
    train(changed(full_run, "seed", 4), tmp_path / "base")
    with pytest.raises(CheckpointError, match="other weights"):
        load_pretrained(tmp_path / "child")


def test_merging_keeps_the_logits(lora_run, pretrained, lora_config):
    base = load_pretrained(pretrained, mask_token=10)
    merged, beside = load_pretrained(lora_run), load_pretrained(lora_run, merge=False)
    assert merged.model.lora is None and beside.model.lora.rank == 2 and merged.diffusion.mask_token_id == 10
    np.testing.assert_allclose(logits(merged), logits(beside), atol=1e-5)
    assert np.abs(logits(merged) - logits(base)).max() > 1e-3  # it has an effect
    stored = checkpoint_arrays(lora_run, 4)
    for name in ("q", "out"):
        layer = getattr(merged.model.blocks.attention, name)
        a, b = (stored[f"ema/blocks.attention.{name}.factors.{f}"] for f in "ab")
        start = getattr(base.model.blocks.attention, name).kernel[...].astype(jnp.bfloat16).astype(jnp.float32)
        product = 2.0 * np.stack([np.tensordot(x, y, 1) for x, y in zip(a, b, strict=True)])
        np.testing.assert_allclose(layer.kernel[...], start + product, atol=1e-6)
    np.testing.assert_array_equal(merged.model.blocks.mlp_norm.scale[...], base.model.blocks.mlp_norm.scale[...])
    lm = DiffusionLM.from_pretrained(lora_run, mesh=MeshConfig(fsdp=4, data=2))
    np.testing.assert_allclose(logits(lm), logits(merged), atol=1e-5)


def test_lora_run_on_a_lora_run(lora_run, lora_config, tmp_path):
    child = continued(lora_config, f"{lora_run}@2", lora=SMALL_LORA)
    train(child, tmp_path / "child")
    record = LoRABase.read(tmp_path / "child")
    assert record.source == f"{lora_run}@2" and record.lora.targets == ("q", "k", "v") and record.lora.alpha == 2.0
    stacked, below, last = (load_pretrained(path) for path in (tmp_path / "child", f"{lora_run}@2", lora_run))
    assert_only_attention_differs(stacked, below)
    assert not np.array_equal(last.model.blocks.mlp.up.kernel[...], below.model.blocks.mlp.up.kernel[...])
    DiffusionLM.from_pretrained(tmp_path / "child", merge=False).save_pretrained(tmp_path / "adapter", layout="peft")
    content = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert content["base_model_name_or_path"] == f"{lora_run}@2"
    np.testing.assert_allclose(logits(load_pretrained(tmp_path / "adapter")), logits(stacked), atol=1e-5)


def test_lora_run_on_a_peft_adapter(lora_run, lora_config, tmp_path):
    """A run's adapter is exported; another run starts from it, resumes, and is exported beside it."""
    lm = DiffusionLM.from_pretrained(lora_run, merge=False)
    lm.save_pretrained(tmp_path / "adapter", layout="peft")
    exact = load_pretrained(tmp_path / "adapter")
    np.testing.assert_allclose(logits(exact), logits(lm), atol=2e-2)  # this base is not rounded to bfloat16
    assert exact.diffusion.mask_token_id == 10 and exact.tokenizer.decode([1, 2]) == "ab"
    child = continued(lora_config, tmp_path / "adapter", lora=SMALL_LORA)
    train(child, tmp_path / "child")
    train(changed(child, "num_steps", 2), tmp_path / "child")
    stacked = load_pretrained(tmp_path / "child")
    assert_only_attention_differs(stacked, exact)
    DiffusionLM.from_pretrained(tmp_path / "child", merge=False).save_pretrained(tmp_path / "second", layout="peft")
    np.testing.assert_allclose(logits(load_pretrained(tmp_path / "second")), logits(stacked), atol=1e-5)


def test_new_mask_token_trains_the_embedding(lora_config, tmp_path):
    run = changed(changed(lora_config, "num_steps", 1), "model.mask_token", "<mask>")
    train(run, tmp_path / "run")
    model = load_pretrained(tmp_path / "run").model
    assert model.config.vocab_size == 12
    table = model.embed.embedding[...]
    assert np.abs(table[11] - table[:11].mean(0)).max() > 1e-4
    for embedding, resolved in ((False, False), (None, True)):
        assert resolve_lora(LoRASettings(rank=2, embedding=embedding), model.config, True).embedding == resolved


def test_moved_base_is_found_and_changed_base_refused(lora_run, lora_config, pretrained, tmp_path):
    shutil.copytree(lora_run, tmp_path / "run")
    shutil.copytree(pretrained, tmp_path / pretrained.name)
    assert LoRABase.read(tmp_path / "run").source == str(pretrained)
    families.set_config(tmp_path / "run", "adapter.json", source=f"/not/here/{pretrained.name}")
    moved, expected = load_pretrained(tmp_path / "run"), load_pretrained(lora_run)
    np.testing.assert_array_equal(logits(moved), logits(expected))
    other = load_pretrained(pretrained)
    bias = other.model.blocks.mlp.up.bias
    bias[...] = bias[...].at[1, 3].add(1e-6)
    shutil.rmtree(tmp_path / pretrained.name)
    save_pretrained(tmp_path / pretrained.name, other)
    with pytest.raises(CheckpointError, match="other weights"):
        load_pretrained(tmp_path / "run")
    with pytest.raises(CheckpointError, match="other weights"):
        train(changed(lora_config, "num_steps", 12), tmp_path / "run")
    shutil.rmtree(tmp_path / pretrained.name)
    with pytest.raises(CheckpointError, match="/not/here"):
        load_pretrained(tmp_path / "run")
    (tmp_path / "run" / "adapter.json").write_text("{")
    with pytest.raises(CheckpointError, match="adapter.json"):
        load_pretrained(tmp_path / "run")


def test_fingerprint_depends_on_bits_and_not_on_sharding(pretrained):
    params = nnx.state(load_pretrained(pretrained).model)
    found = fingerprint(params)
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    assert fingerprint(jax.device_put(params, param_shardings(params, mesh))) == found
    kernel = params["blocks"]["mlp"]["up"]["kernel"]
    params["blocks"]["mlp"]["up"]["kernel"] = kernel.replace(kernel[...].at[1, 2, 3].mul(1 + 2e-7))
    assert fingerprint(params) != found
    params["blocks"]["mlp"]["up"]["kernel"] = kernel.replace(jnp.flip(kernel[...], 1))
    assert fingerprint(params) != found


def test_arguments_must_fit_the_source(lora_run, pretrained):
    for source, settings in ((lora_run, {"base": "x"}), (lora_run, {"mask_token": "<new>"}),
                             (pretrained, {"base": "x"}),
                             (pretrained, {"merge": False}), (pretrained, {"init": "other"})):
        with pytest.raises(ConfigError, match=str(source) if "init" not in settings else "other"):
            load_pretrained(source, **settings)
    abstract = load_pretrained(lora_run, init="abstract")
    assert abstract.diffusion.mask_token_id == 10 and abstract.recipe["lora.rank"] == 2
    assert isinstance(abstract.model.embed.embedding.get_value(), jax.ShapeDtypeStruct)


@pytest.mark.parametrize("key, value, message", [
    ("lora.targets", ("q", "nonsense"), "nonsense.*q, k, v, out, up, down .*c_attn"),
    ("lora.targets", ("gate",), "gate"), ("lora.rank", 17, "lora.rank|16"), ("lora.head", True, "lora.embedding"),
    ("model.init", "random", "model.init"), ("lora.dropout", 1.5, "lora.dropout")])
def test_invalid_settings_are_refused_at_start(lora_config, tmp_path, key, value, message):
    with pytest.raises(ConfigError, match=message) as caught:
        train(changed(lora_config, key, value), tmp_path)
    assert "\n" not in str(caught.value)


def test_resume_refuses_other_lora_settings(lora_run, lora_config):
    with pytest.raises(ConfigError, match="lora.rank"):
        train(changed(changed(lora_config, "lora.rank", 4), "num_steps", 12), lora_run)
    plain = changed(lora_config, "lora", LoRASettings())
    before_lora = {key: value for key, value in flat_dict(plain).items() if not key.startswith("lora.")}
    assert config_changes(before_lora, plain) == []
