"""ConfigDicts, overrides and frozen dataclasses, on a small tree of them."""

import dataclasses
import itertools

import ml_collections
import pytest

from dlm_jax.cli.config import build_config, describe_config, to_config_dict
from dlm_jax.errors import ConfigError


def _field(default, meaning):
    return dataclasses.field(default=default, metadata={"help": meaning})


@dataclasses.dataclass(frozen=True)
class Optimizer:
    rate: float = _field(0.1, "how fast")
    warmup: int | None = _field(None, "steps of it")
    name: str | None = _field(None, "what it is called")
    files: tuple[str, ...] = _field((), "what it reads")


@dataclasses.dataclass(frozen=True)
class Config:
    steps: int = _field(10, "how long")
    mask: int | str | None = _field(None, "a token")
    optimizer: Optimizer = _field(Optimizer(), "how")

    def __post_init__(self):
        if self.optimizer.warmup is not None and self.optimizer.warmup > self.steps:
            raise ConfigError(f"optimizer.warmup {self.optimizer.warmup} is more than steps {self.steps}")


def refusal(recipe, overrides=()) -> str:
    with pytest.raises(ConfigError) as caught:
        build_config(Config, ml_collections.ConfigDict(recipe), overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_there_and_back_is_the_same():
    config = Config(steps=3, mask="m", optimizer=Optimizer(warmup=2, files=("a", "b")))
    assert build_config(Config, to_config_dict(config)) == config
    assert build_config(Config, ml_collections.ConfigDict()) == Config()


def test_keys_that_are_none_have_a_type():
    recipe = to_config_dict(Config())
    for mask in (7, "seven", None):  # either type, one after the other
        recipe.mask = mask
        assert build_config(Config, recipe).mask == mask
    assert build_config(Config, recipe, [("optimizer.warmup", "5"), ("mask", "m")]).mask == "m"
    assert "an integer or none" in refusal(recipe, [("optimizer.warmup", "five")])
    recipe.optimizer.warmup = "five"
    assert "an integer or none" in refusal(recipe)


def test_a_strict_recipe_from_scratch_is_merged_with_the_defaults():
    recipe = ml_collections.ConfigDict({"steps": 3, "optimizer": {"rate": 1}}).lock()
    assert build_config(Config, recipe) == Config(steps=3, optimizer=Optimizer(rate=1.0))
    overrides = [("optimizer.rate", "0.5"), ("mask", "m"), ("optimizer.warmup", "2")]
    assert build_config(Config, recipe, overrides) == Config(3, "m", Optimizer(rate=0.5, warmup=2))


def test_overrides_may_come_in_any_order_and_the_last_of_a_key_counts():
    overrides = [("optimizer.warmup", "50"), ("steps", "100"), ("optimizer.files", "a,b"), ("mask", "9")]
    expected = Config(100, 9, Optimizer(warmup=50, files=("a", "b")))
    for order in itertools.permutations(overrides):
        assert build_config(Config, to_config_dict(Config()), order) == expected
    assert build_config(Config, to_config_dict(Config()), [("steps", "1"), ("steps", "2")]).steps == 2


def test_building_leaves_the_recipe_alone():
    recipe = to_config_dict(Config())
    build_config(Config, recipe, [("steps", "99"), ("optimizer.warmup", "3")])
    assert build_config(Config, recipe) == Config()


def test_an_override_reaches_keys_that_refer_to_it():
    recipe = to_config_dict(Config())
    recipe.optimizer.warmup = recipe.get_oneway_ref("steps")
    assert build_config(Config, recipe, [("steps", "77")]).optimizer.warmup == 77


def test_misspelt_keys_are_named_with_the_nearest():
    assert "config.optimizer.rat (did you mean config.optimizer.rate?)" in refusal({}, [("optimizer.rat", "1")])
    assert "config.rate (did you mean config.optimizer.rate?)" in refusal({}, [("rate", "1")])
    assert "config.steps.x" in refusal({}, [("steps.x", "1")])
    assert "config.optimiser (did you mean config.optimizer?)" in refusal({"optimiser": {"rate": 1.0}})
    assert "config.optimizer.rat (did you mean" in refusal({"optimizer": {"rat": 1.0}})
    assert "--print_config" in refusal({}, [("zzz", "1")])


def test_values_of_another_type_are_named_with_what_is_taken():
    assert refusal({}, [("steps", "many")]) == "config.steps takes an integer, not 'many'"
    assert refusal({"steps": 1.5}) == "config.steps takes an integer, not 1.5"
    assert refusal({"optimizer": {"warmup": "x"}}) == "config.optimizer.warmup takes an integer or none, not 'x'"
    assert "is a group of keys" in refusal({}, [("optimizer", "adam")])
    assert "is a group of keys" in refusal({"optimizer": 3})


def test_impossible_combinations_are_the_dataclass_to_refuse():
    assert refusal({}, [("optimizer.warmup", "11")]) == "optimizer.warmup 11 is more than steps 10"


def test_every_key_is_described_and_can_be_pasted():
    config = Config(3, None, Optimizer(files=("a", "b")))
    lines = describe_config(config)
    assert len(lines) == 6 and any("how fast [a number]" in line for line in lines)
    pasted = [tuple(line.split()[0].removeprefix("--config.").split("=", 1)) for line in lines]
    assert build_config(Config, ml_collections.ConfigDict(), pasted) == config
