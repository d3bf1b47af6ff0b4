import dataclasses
import functools

import pytest

from dlm_jax.errors import ConfigError
from dlm_jax.training.config import TrainConfig, config_changes, flat_dict


def fields(cls):
    for field in dataclasses.fields(cls):
        yield field
        if dataclasses.is_dataclass(field.default):
            yield from fields(type(field.default))


def test_every_key_has_a_meaning():
    assert [field.name for field in fields(TrainConfig) if not field.metadata.get("help")] == []


def test_changes_are_shown_or_refused(config):
    saved = flat_dict(config)
    assert config_changes(saved, config) == []
    longer = dataclasses.replace(config, num_steps=99)
    assert config_changes(saved, longer) == ["num_steps: 20 -> 99"]
    with pytest.raises(ConfigError, match="seed: 3 -> 4"):
        config_changes(saved, dataclasses.replace(longer, seed=4))


@pytest.mark.parametrize("changes, message", [
    ({"num_steps": 0}, "num_steps"), ({"optimizer.accumulate_steps": 3}, "multiple"), ({"log.every": 0}, "log.every"),
    ({"log.sample_every": 5, "objective.name": "autoregressive"}, "sample_every"),
    ({"optimizer.ema_decay": 1.0}, "ema_decay"), ({"optimizer.learning_rate": -1.0}, "negative")])
def test_impossible_combinations_are_refused(config, changes, message):
    def replaced(part, key, value):
        name, _, rest = key.partition(".")
        return dataclasses.replace(part, **{name: replaced(getattr(part, name), rest, value) if rest else value})

    with pytest.raises(ConfigError, match=message):
        functools.reduce(lambda part, item: replaced(part, *item), changes.items(), config)
