"""Setting a run up: what is refused, and dropout in place of the base's."""

import dataclasses

import jax
import pytest
from flax import nnx

from dlm_jax.checkpoints import load_pretrained, save_pretrained
from dlm_jax.diffusion import DiffusionSpec, ObjectiveConfig
from dlm_jax.errors import ConfigError
from dlm_jax.parallel import make_mesh
from dlm_jax.training import train
from dlm_jax.training.config import LoRASettings, ModelSource
from dlm_jax.training.setup import check_noised_lora, load_base, with_dropout
from tests.training.conftest import changed


@pytest.mark.parametrize("key, value, message", [
    ("data.length", 64, "data.length"),
    ("data.batch_size", 24, "data.batch_size"), ("model.source", "", "model.source"), ("mesh.context", 3, "mesh"),
    ("log.wandb", "project", "wandb")])
def test_invalid_runs_are_refused(config, tmp_path, key, value, message):
    with pytest.raises(ConfigError, match=message):
        train(changed(config, key, value), tmp_path)


BLOCKS = ObjectiveConfig("block_diffusion", block_size=8)
GROWING = dataclasses.replace(BLOCKS, block_size_schedule=((0, 1), (5, 8)))
NOISED = LoRASettings(2, where="noised")


@pytest.mark.parametrize("objective, lora, message", [
    (ObjectiveConfig(), NOISED, "lora.where"),
    (dataclasses.replace(BLOCKS, clean_attention="block_bidirectional"), NOISED, "clean_attention"),
    (GROWING, NOISED, "block_size_schedule"),  # under the shift, blocks of one token have no noised copy
    (dataclasses.replace(BLOCKS, block_size=16), NOISED, "block_size"),  # nor has a block of the full row a clean one
    (BLOCKS, dataclasses.replace(NOISED, draft_head=True), "lora.draft_head"),
    (ObjectiveConfig("self_drafting", block_size=4), LoRASettings(2), "lora.where"),
    (ObjectiveConfig("self_drafting", block_size=17), NOISED, "block_size")])
def test_lora_that_would_learn_nothing_is_refused(config, objective, lora, message):
    with pytest.raises(ConfigError, match=message):
        check_noised_lora(dataclasses.replace(config, objective=objective, lora=lora))


def test_lora_at_noised_positions_of_blocks(config):
    for objective in (BLOCKS, dataclasses.replace(GROWING, block_size_schedule=((0, 2), (5, 8))),
                      dataclasses.replace(GROWING, shift=False)):
        check_noised_lora(dataclasses.replace(config, objective=objective, lora=NOISED))


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
