"""Settings that need help texts, changes on resuming, and what is refused."""

import dataclasses

import pytest

from dlm_jax.errors import ConfigError
from dlm_jax.training.config import OLD_KEYS, OLD_VALUES, TrainConfig, config_changes, flat_dict
from tests.training.conftest import changed


def fields(cls):
    for field in dataclasses.fields(cls):
        yield field
        if dataclasses.is_dataclass(field.default):
            yield from fields(type(field.default))


def test_every_key_has_help():
    assert [field.name for field in fields(TrainConfig) if not field.metadata.get("help")] == []


def test_changes_are_shown(config):
    saved = flat_dict(config)
    assert config_changes(saved, config) == []
    longer = dataclasses.replace(config, num_steps=99)
    assert config_changes(saved, longer) == ["num_steps: 20 -> 99"]


@pytest.mark.parametrize("key, value", [("seed", 4), ("data.length", 8), ("optimizer.name", "lion"),
                                        ("model.mask_token", 3), ("objective.shift", False),
                                        ("optimizer.ema_decay", 0.0)])
def test_changes_that_make_another_run_are_refused(config, key, value):
    with pytest.raises(ConfigError, match=key):
        config_changes(flat_dict(config), changed(config, key, value))


@pytest.mark.parametrize("key, value, message", [
    ("num_steps", 0, "num_steps"), ("optimizer.accumulate_steps", 3, "optimizer.accumulate_steps"),
    ("optimizer.accumulate_steps", 0, "optimizer.accumulate_steps"), ("optimizer.name", "sgd", "optimizer.name"),
    ("optimizer.ema_decay", 1.0, "optimizer.ema_decay"), ("optimizer.learning_rate", -1.0, "optimizer.learning_rate"),
    ("model.dropout", -0.1, "model.dropout"), ("model.dropout", 1.0, "model.dropout"),
    ("log.profile", (5,), "log.profile"), ("log.profile", (6, 5), "log.profile"), ("log.every", 0, "log.every"),
    ("checkpoint.every", 0, "checkpoint.every"), ("checkpoint.keep", 0, "checkpoint.keep"),
    ("validation.num_generations", -1, "validation.num_generations"),
    ("validation.num_generations", 4, "data.examples.format"),
    ("validation.generation_steps", 0, "validation.generation_steps")])
def test_invalid_settings_are_refused(config, key, value, message):
    with pytest.raises(ConfigError, match=message):
        changed(config, key, value)


def test_sampling_needs_the_diffusion_objective(config):
    with pytest.raises(ConfigError, match="log.sample_every"):
        changed(changed(config, "log.sample_every", 5), "objective.name", "autoregressive")


@pytest.mark.parametrize("old, new", OLD_KEYS.items())
def test_old_keys_name_existing_ones(old, new):
    assert new in flat_dict(TrainConfig()) and old not in flat_dict(TrainConfig())
    assert set(OLD_VALUES) <= set(flat_dict(TrainConfig()))
