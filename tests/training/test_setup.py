"""Setting a run up: what is refused, dropout in place of the base's, restoring on any devices."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from flax import nnx

from dlm_jax.checkpoints import load_pretrained, save_pretrained
from dlm_jax.checkpoints.orbax import named, restore_state
from dlm_jax.diffusion import DiffusionSpec
from dlm_jax.errors import ConfigError, DataError
from dlm_jax.parallel import make_mesh
from dlm_jax.training import read_records, train
from dlm_jax.training.config import ModelSource
from dlm_jax.training.optimizer import make_optimizer
from dlm_jax.training.step import state_layout
from tests.training.conftest import changed, checkpoint_arrays


@pytest.mark.parametrize("key, value, message", [
    ("model.mask_token", None, "model.mask_token"), ("data.length", 64, "data.length"),
    ("data.batch_size", 24, "data.batch_size"), ("model.source", "", "model.source"), ("mesh.context", 3, "mesh"),
    ("log.wandb", "project", "wandb")])
def test_invalid_runs_are_refused(config, tmp_path, key, value, message):
    with pytest.raises(ConfigError, match=message):
        train(changed(config, key, value), tmp_path)


@pytest.mark.parametrize("key, value", [("seed", 4), ("data.length", 8), ("optimizer.name", "lion"),
                                        ("model.mask_token", 3), ("objective.shift", False),
                                        ("optimizer.ema_decay", 0.0)])
def test_changes_that_make_another_run_are_refused(full_run, config, key, value):
    with pytest.raises(ConfigError, match=key):
        train(changed(changed(config, key, value), "num_steps", 25), full_run[0])


def test_other_text_of_the_same_name_is_refused(config, corpus, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(corpus.read_text())
    run = changed(changed(config, "data.train", (str(text),)), "num_steps", 1)
    train(run, tmp_path / "run")
    text.write_text(corpus.read_text().replace("a", "b"))
    with pytest.raises(DataError, match="training text"):
        train(changed(run, "num_steps", 2), tmp_path / "run")


def test_base_without_shift_stays_without(config, pretrained, tmp_path):
    base = load_pretrained(pretrained, mask_token=10)
    save_pretrained(tmp_path / "base", dataclasses.replace(base, diffusion=DiffusionSpec(10, shift=False)))
    run = dataclasses.replace(config, num_steps=1, model=ModelSource(source=str(tmp_path / "base")))
    with pytest.raises(ConfigError, match="objective.shift"):
        train(run, tmp_path / "run")
    train(changed(run, "objective.shift", False), tmp_path / "run")
    assert not load_pretrained(tmp_path / "run").diffusion.shift


def test_dropout_replaces_the_rates_of_the_base(config, base, tmp_path):
    shutil.copytree(base, tmp_path / "base")
    path = tmp_path / "base" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict.fromkeys(
        ("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)))
    quick = dataclasses.replace(config, num_steps=2, log=dataclasses.replace(config.log, every=2))
    runs = {"given": changed(quick, "model.dropout", 0.0), "stored": changed(quick, "model.source", str(path.parent)),
            "neither": quick}
    losses = {}
    for name, run in runs.items():
        train(run, tmp_path / name)
        losses[name] = read_records(tmp_path / name, "train")[-1]["loss"]
    assert losses["given"] == losses["stored"] != losses["neither"]
    assert json.loads((tmp_path / "given" / "model" / "config.json").read_text())["attn_pdrop"] == 0.0


@pytest.mark.parametrize("devices", [8, 2, 1])
def test_state_is_restored_on_any_number_of_devices(full_run, config, devices):
    mesh = make_mesh(devices=jax.devices()[:devices])
    params = nnx.state(load_pretrained(full_run[0]).model)
    layout = state_layout(params, make_optimizer(config.optimizer, 20), True, mesh)
    state, progress = restore_state(full_run[0], 20, layout)
    assert int(state.step) == 20 and progress["metrics"]["steps"] == 0
    found = {f"{item}/{name}": value for item, tree in (
        ("params", state.params), ("optimizer", state.opt_state), ("ema", state.ema)) for name, value in
        named(tree).items()}
    stored = checkpoint_arrays(full_run[0], 20)
    assert found.keys() == stored.keys() and all(len(value.devices()) == devices for value in found.values())
    for name, value in stored.items():
        np.testing.assert_array_equal(found[name], value)
