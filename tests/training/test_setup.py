"""Setting a run up: what is refused, dropout in place of the base's, restoring on any devices."""

import dataclasses
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
from dlm_jax.training import train
from dlm_jax.training.config import ModelSource
from dlm_jax.training.optimizer import make_optimizer
from dlm_jax.training.setup import load_base, with_dropout
from dlm_jax.training.state import state_layout
from tests.training.conftest import changed, checkpoint_arrays


@pytest.mark.parametrize("key, value, message", [
    ("data.length", 64, "data.length"),
    ("data.batch_size", 24, "data.batch_size"), ("model.source", "", "model.source"), ("mesh.context", 3, "mesh"),
    ("log.wandb", "project", "wandb")])
def test_invalid_runs_are_refused(config, tmp_path, key, value, message):
    with pytest.raises(ConfigError, match=message):
        train(changed(config, key, value), tmp_path)


def test_change_that_makes_another_run_is_refused(full_run, config):
    with pytest.raises(ConfigError, match="seed"):
        train(dataclasses.replace(config, seed=4, num_steps=25), full_run[0])


def test_other_text_is_refused(full_run, config, corpus, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(corpus.read_text().replace("a", "b"))
    shutil.copytree(full_run[0], tmp_path / "run")
    with pytest.raises(DataError, match="training text"):
        train(dataclasses.replace(changed(config, "data.train", (str(text),)), num_steps=25), tmp_path / "run")


def test_base_without_shift_and_other_dropout(config, pretrained, tmp_path):
    base = load_pretrained(pretrained, mask_token=10)
    assert base.model.config.attention_dropout == 0.1
    save_pretrained(tmp_path / "base", dataclasses.replace(base, diffusion=DiffusionSpec(10, shift=False)))
    run = dataclasses.replace(config, num_steps=1, model=ModelSource(source=str(tmp_path / "base"), dropout=0.0))
    with pytest.raises(ConfigError, match="objective.shift"):
        train(run, tmp_path / "run")
    train(changed(run, "objective.shift", False), tmp_path / "run")
    trained = load_pretrained(tmp_path / "run")
    assert not trained.diffusion.shift and trained.model.config == with_dropout(base.model.config, 0.0)


def test_dropout_is_that_of_the_config(config, base, tmp_path):
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        own, given = (load_base(changed(config, "model.dropout", rate), tmp_path, mesh, resumed=False)[0].model
                      for rate in (None, 0.0))
    assert own.config == with_dropout(given.config, 0.1) != given.config
    assert nnx.graphdef(own) != nnx.graphdef(given)


@pytest.mark.parametrize("devices", [2, 1])
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
