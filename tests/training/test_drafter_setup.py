"""Runs of a drafter: what they save, sampling and export with it, exact resumption, and what is refused."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dlm_jax import DiffusionLM
from dlm_jax.checkpoints import Pretrained, load_pretrained, open_drafter, save_pretrained
from dlm_jax.checkpoints.drafter import resolve_drafter
from dlm_jax.checkpoints.workdir import DrafterRecord
from dlm_jax.cli.config import build_config, load_recipe
from dlm_jax.cli.main import main
from dlm_jax.diffusion import DiffusionSpec, ObjectiveConfig
from dlm_jax.errors import CheckpointError, ConfigError
from dlm_jax.models import Compute, DraftedModel, ModelConfig, Transformer, abstract_drafter, combine_fingerprints
from dlm_jax.sampling import SamplingStats
from dlm_jax.training import train
from dlm_jax.training.config import TrainConfig
from dlm_jax.training.drafter_setup import add_drafter, check_losses
from dlm_jax.training.setup import new_record
from tests.training.conftest import changed, checkpoint_arrays
from tests.training.steps import MASK, one_device
from tests.training.test_draft_loss import DSPARK, OBJECTIVES, TARGET


def test_a_drafter_begins_with_copies_of_the_last_layers():
    target = Transformer(TARGET, rngs=nnx.Rngs(0))
    base = Pretrained(target, None, DiffusionSpec(MASK), {}, "here")
    config = TrainConfig(objective=OBJECTIVES["dspark"], drafter=dataclasses.replace(DSPARK, init="target"))
    drafter = add_drafter(base, config, one_device(), None).model.drafter
    for found, expected in zip(jax.tree.leaves(nnx.state(drafter.blocks)), jax.tree.leaves(nnx.state(target.blocks)),
                               strict=True):
        np.testing.assert_array_equal(found, expected[-2:])
    # What it fuses is what the first of them would have read after the last tapped layer.
    features = jax.random.normal(jax.random.key(0), (1, 3, 2 * 16))
    np.testing.assert_allclose(drafter.fuse(features)[0], jax.vmap(lambda x: x * jax.lax.rsqrt(
        jnp.mean(x * x) + TARGET.norm_eps))(features[0, :, 16:]), rtol=1e-5)


def test_a_merged_target_is_recorded_by_what_it_was_merged_from():
    """Merging rounds differently from device to device, and the run may resume on another."""
    drafted = types.SimpleNamespace(target=None, drafter=types.SimpleNamespace(config=None))
    base = Pretrained(drafted, None, DiffusionSpec(MASK), {}, "here", provenance=("base", "lora"))
    record = new_record(TrainConfig(objective=ObjectiveConfig("drafter")), base)
    assert record.source == "here" and record.fingerprint == combine_fingerprints("base", "lora")


@pytest.fixture(scope="module")
def target(base, tmp_path_factory):
    """A GPT-2 with weights, and a free row for the mask token."""
    shape, directory = tmp_path_factory.mktemp("shape"), tmp_path_factory.mktemp("target") / "model"
    for file in base.iterdir():
        (shape / file.name).write_bytes(file.read_bytes())
    settings = json.loads((base / "config.json").read_text()) | {"n_layer": 5, "initializer_range": 0.2}
    (shape / "config.json").write_text(json.dumps(settings))
    save_pretrained(directory, load_pretrained(shape, init="random", seed=5))
    return directory


@pytest.fixture(scope="module")
def draft_config(config, target):
    for key, value in {"model.source": str(target), "model.init": "pretrained", "model.mask_token": 11,
                       "objective": OBJECTIVES["dspark"], "drafter": DSPARK,
                       "num_steps": 10, "validation.every": 5}.items():
        config = changed(config, key, value)
    return config


@pytest.fixture(scope="module")
def drafter_run(draft_config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "drafter"
    return workdir, train(draft_config, workdir)


def test_a_run_of_a_drafter(drafter_run, draft_config, target, tmp_path):
    workdir, summary = drafter_run
    assert summary["train"]["loss"] > 0 and 1 <= summary["validation"]["tokens_per_pass"] <= 4
    assert summary["best_step"] in (5, 10)
    names = {name.split("/")[1].split(".")[0] for name in checkpoint_arrays(workdir, 10) if name.startswith("params")}
    assert names == {"drafter"}

    stored = open_drafter(workdir)
    assert stored.target == str(target) and stored.drafter.config == DrafterRecord.read(workdir).config
    average = checkpoint_arrays(workdir, 10)["ema/drafter.fc.kernel"]
    np.testing.assert_array_equal(stored.drafter.fc.kernel[...], average)
    DraftedModel(load_pretrained(stored.target).model, stored.drafter)
    at = open_drafter(f"{workdir}@5", param_dtype="bfloat16").drafter
    assert at.fc.kernel.dtype == jnp.bfloat16 and not np.array_equal(at.fc.kernel[...], average)
    with pytest.raises(CheckpointError, match=r"drafter\.json"):
        open_drafter(tmp_path)
    with pytest.raises(CheckpointError, match="target"):
        load_pretrained(workdir)


def test_sampling_with_a_run(drafter_run, target, tmp_path, capsys):
    """By its name, from Python and from the command line: the target's own text, and what it took."""
    workdir, _ = drafter_run
    lm, stats = DiffusionLM.from_pretrained(target), SamplingStats()
    settings = dict(max_new_tokens=10, policy="autoregressive", temperature=0.0)
    expected = lm.generate(["ab", "cab"], **settings)
    assert lm.generate(["ab", "cab"], drafter=str(workdir), stats=stats, **settings) == expected
    assert stats.texts == 2 and len(stats.acceptance) == DSPARK.block_size
    assert main(["sample", f"--model={target}", f"--drafter={workdir}", "--prompt=ab", "--max_new_tokens=10",
                 "--temperature=0", f"--json={tmp_path / 'result.json'}"]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["samples"][0]["text"] == expected[0] and len(result["acceptance_by_position"]) == DSPARK.block_size
    assert main(["sample", f"--model={target}", f"--drafter={tmp_path / 'nowhere'}", "--prompt=ab"]) == 1
    assert "nowhere" in capsys.readouterr().err


def test_export_of_a_run(drafter_run, target, tmp_path, capsys):
    workdir, _ = drafter_run
    assert main(["export", f"--drafter={workdir}@5", f"--output={tmp_path / 'out'}"]) == 0
    assert "layout" in capsys.readouterr().out
    stored = open_drafter(f"{workdir}@5", target=load_pretrained(target).model).drafter
    exported = open_drafter(tmp_path / "out", target=load_pretrained(target).model).drafter
    jax.tree.map(np.testing.assert_array_equal, nnx.state(exported), nnx.state(stored))
    tokens, fused = jnp.full((1, 3, exported.config.layers.hidden_size), 0.1), jnp.ones((1, 9, 16))
    for a, b in zip(*(jax.tree.leaves(jax.jit(lambda d: d.hidden(fused, tokens, jnp.array([[4]])))(d))
                      for d in (stored, exported)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_resuming_is_exact(drafter_run, draft_config, tmp_path):
    train(dataclasses.replace(draft_config, num_steps=5, optimizer=draft_config.optimizer), tmp_path)
    train(draft_config, tmp_path)
    full, resumed = (checkpoint_arrays(workdir, 10) for workdir in (drafter_run[0], tmp_path))
    assert full.keys() == resumed.keys()
    for name in full:
        np.testing.assert_array_equal(full[name], resumed[name], err_msg=name)


def test_a_changed_target_is_refused(draft_config, target, tmp_path):
    moved = tmp_path / "target"
    moved.mkdir()
    for file in target.iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    config = changed(changed(draft_config, "model.source", str(moved)), "num_steps", 5)
    train(config, tmp_path / "run")
    save_pretrained(tmp_path / "other", load_pretrained(target, init="random", seed=6))
    (moved / "model.safetensors").write_bytes((tmp_path / "other" / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="weights"):
        train(changed(config, "num_steps", 10), tmp_path / "run")


@pytest.mark.parametrize("key, value, named", [
    ("model.mask_token", "<new>", "mask_token"), ("drafter.confidence_head", False, "confidence_head"),
    ("drafter.num_target_layers", 4, "layers"), ("drafter.init", "target", "rotary")])
def test_what_does_not_fit_is_refused(draft_config, tmp_path, key, value, named):
    with pytest.raises(ConfigError, match=named):
        train(changed(draft_config, key, value), tmp_path)


@pytest.mark.parametrize("key, value", [("lora.rank", 4), ("model.init", "random")])
def test_what_would_change_the_target_is_refused(draft_config, key, value):
    with pytest.raises(ConfigError, match=key):
        changed(draft_config, key, value)


@pytest.mark.parametrize("name, drafts, sizes", [
    ("dflash_qwen3_8b", 15, {"fc": 5 * 4096 * 4096}),
    ("dspark_qwen3_8b", 7, {"markov": 2 * 151_936 * 256, "confidence_head": 4096 + 256 + 1}),
    ("dflash2_qwen3_8b", 15, {"selector": 2 * 151_936 * 256 + 4096 * 256})])
def test_recipes_with_published_settings(name, drafts, sizes):
    """The sizes of the tensors of the released drafters for Qwen3-8B."""
    config = build_config(TrainConfig, load_recipe(name))
    qwen3 = ModelConfig("qwen3", vocab_size=151_936, hidden_size=4096, num_layers=36, num_heads=32, num_kv_heads=8,
                        head_dim=128, mlp_size=12_288, max_length=40_960, rope_theta=1e6, qk_norm=True)
    drafter_config = resolve_drafter(config.drafter, qwen3, config.model.mask_token)
    check_losses(config.objective.drafts, drafter_config)
    assert drafter_config.target_layer_ids == (1, 9, 17, 25, 33) and drafter_config.num_drafts == drafts
    drafter = abstract_drafter(drafter_config, Compute(), "float32")
    count = lambda module: sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module)))  # noqa: E731
    layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 12_288 + 2 * 4096 + 2 * 128
    convolutions = 2 * (4 * 4096 + 4096 * 4 * 4096 // 16) if drafter_config.conv_kernel_size else 0
    assert count(drafter.blocks) == 5 * (layer + convolutions)
    for part, size in sizes.items():
        assert count(getattr(drafter, part)) == size
