"""Recipes, overrides and frozen dataclasses, on a small tree of them and on the recipes that are shipped."""

import dataclasses
import itertools
from typing import Literal

import ml_collections
import pytest

from dlm_jax.cli.config import (
    InvalidValue,
    build_config,
    check_value,
    describe_config,
    format_value,
    load_recipe,
    parse_value,
    recipe_folder,
    recipe_names,
    to_config_dict,
    train_defaults,
    type_name,
)
from dlm_jax.errors import ConfigError
from dlm_jax.training.config import OLD_KEYS, TrainConfig, flat_dict


def _field(default, help_text):
    return dataclasses.field(default=default, metadata={"help": help_text})


@dataclasses.dataclass(frozen=True)
class Optimizer:
    rate: float = _field(0.1, "how fast")
    warmup: int | None = _field(None, "steps of it")
    name: Literal["adam", "sgd"] = _field("adam", "which one")
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


def test_round_trip_to_config_dict():
    config = Config(steps=3, mask="m", optimizer=Optimizer(warmup=2, files=("a", "b")))
    assert build_config(Config, to_config_dict(config)) == config
    assert build_config(Config, ml_collections.ConfigDict()) == Config()


def test_recipe_of_either_type():
    recipe = to_config_dict(Config())
    for mask in (7, "seven", None):  # either type, one after the other
        recipe.mask = mask
        assert build_config(Config, recipe).mask == mask


def test_order_of_overrides():
    recipe = to_config_dict(Config())
    overrides = [("optimizer.warmup", "50"), ("steps", "100"), ("optimizer.files", "a,b"), ("mask", "9")]
    for order in itertools.permutations(overrides):
        assert build_config(Config, recipe, order) == Config(100, 9, Optimizer(warmup=50, files=("a", "b")))
    assert build_config(Config, recipe, [("steps", "1"), ("steps", "2")]).steps == 2  # the last of a key counts
    assert build_config(Config, recipe) == Config()


def test_locked_partial_recipe():
    recipe = ml_collections.ConfigDict({"steps": 3, "optimizer": {"rate": 1}}).lock()
    assert build_config(Config, recipe) == Config(steps=3, optimizer=Optimizer(rate=1.0))
    overrides = [("optimizer.rate", "0.5"), ("mask", "m"), ("optimizer.warmup", "2")]
    assert build_config(Config, recipe, overrides) == Config(3, "m", Optimizer(rate=0.5, warmup=2))


def test_override_of_a_reference():
    recipe = to_config_dict(Config())
    recipe.optimizer.warmup = recipe.get_oneway_ref("steps")
    assert build_config(Config, recipe, [("steps", "77")]).optimizer.warmup == 77


@pytest.mark.parametrize(("recipe", "overrides", "mentions"), [
    ({}, [("optimizer.rat", "1")], ["config.optimizer.rat ", "config.optimizer.rate?"]),
    ({}, [("rate", "1")], ["config.rate ", "config.optimizer.rate?"]),
    ({}, [("steps.x", "1")], ["config.steps.x"]),
    ({"optimiser": {"rate": 1.0}}, [], ["config.optimizer?"]),
    ({"optimizer": {"rat": 1.0}}, [], ["config.optimizer.rate?"]),
    ({}, [("zzz", "1")], ["--print_config"]),
    ({}, [("steps", "many")], ["config.steps", "an integer", "'many'"]),
    ({"steps": 1.5}, [], ["config.steps", "an integer", "1.5"]),
    ({"optimizer": {"warmup": "x"}}, [], ["config.optimizer.warmup", "an integer or none", "'x'"]),
    ({}, [("optimizer.name", "adan")], ["adam, sgd", "did you mean adam?"]),
    ({}, [("optimizer", "adam")], ["config.optimizer", "config.optimizer.rate"]),
    ({"optimizer": 3}, [], ["config.optimizer"]),
    ({}, [("optimizer.warmup", "11")], ["optimizer.warmup 11"]),
    ({}, [("objective.normaliser", "x")], ["config.objective.loss_normalization"]),
    ({"objective": {"normaliser": 3}}, [], ["config.objective"]),
])
def test_mistakes(recipe, overrides, mentions):
    message = refusal(recipe, overrides)
    assert all(each in message for each in mentions), message


def test_old_keys():
    keys = flat_dict(TrainConfig())
    for old, new in OLD_KEYS.items():
        assert old not in keys and new in keys
        with pytest.raises(ConfigError, match=f"config.{new}"):
            build_config(TrainConfig, train_defaults(), [(old, "1")])


def test_described_settings():
    config = Config(3, None, Optimizer(files=("a", "b")))
    lines = describe_config(config)
    assert len(lines) == 6 and any("how fast [a number]" in line for line in lines)
    pasted = [tuple(line.split()[0].removeprefix("--config.").split("=", 1)) for line in lines]
    assert build_config(Config, ml_collections.ConfigDict(), pasted) == config


# ---- Values.


@pytest.mark.parametrize(("kind", "text", "value"), [
    (int, "12", 12), (int, "-3", -3), (int, "1_000", 1000), (int, "1e6", 1_000_000),
    (float, "3", 3.0), (float, "1e-4", 1e-4), (float, "inf", float("inf")),
    (bool, "true", True), (bool, "False", False), (bool, "0", False),
    (str, "a,b=c", "a,b=c"), (str, "", ""), (str, "12", "12"), (str, "none", "none"),
    (Literal["x", "y"], "y", "y"), (Literal[1, 2], "2", 2),
    (int | str | None, "10541", 10541), (int | str | None, "<mask>", "<mask>"), (int | str | None, "none", None),
    (float | None, "0.5", 0.5), (bool | None, "None", None),
    (tuple[str, ...], "", ()), (tuple[str, ...], "a*.txt,b.txt", ("a*.txt", "b.txt")),
    (tuple[str, ...], "('a,b',)", ("a,b",)), (tuple[int, ...], "1,2", (1, 2)),
    (tuple[int, float], "(1, 2)", (1, 2.0)),
    (tuple[tuple[int, float, float], ...], "((0, 0.5, 1), (9, 0, 1))", ((0, 0.5, 1.0), (9, 0.0, 1.0))),
])
def test_parse_value(kind, text, value):
    found = parse_value(text, kind)
    assert found == value and type(found) is type(value)
    assert check_value(value, kind) == value
    if "(" not in text:  # what is shown can be typed again
        assert parse_value(format_value(value), kind) == value


@pytest.mark.parametrize(("kind", "text"), [
    (int, "1.5"), (int, "one"), (int, ""), (int, "1e400"), (int, "nan"), (float, "x"), (float, "nan"), (bool, "maybe"),
    (bool, "2"), (Literal["x", "y"], "z"), (Literal[1, 2], "3"), (int | None, "x"), (tuple[int, ...], "1,x"),
    (tuple[int, float], "(1,)"), (tuple[int, float], "1"), (tuple[str, ...], "('a',"), (tuple[int, ...], "(1, True)"),
])
def test_parse_value_refuses(kind, text):
    with pytest.raises(InvalidValue):
        parse_value(text, kind)


@pytest.mark.parametrize(("kind", "value"), [
    (int, True), (int, 1.0), (int, "1"), (float, "1"), (float, True), (bool, 1), (str, 1), (str, None), (int, None),
    (Literal[1], True), (tuple[str, ...], "ab"), (tuple[int, int], (1, 2, 3))])
def test_check_value_refuses(kind, value):
    with pytest.raises(InvalidValue):
        check_value(value, kind)


def test_check_value():
    assert type(check_value(3, float)) is float
    assert check_value([1, 2], tuple[float, ...]) == (1.0, 2.0)


def test_type_names():
    assert type_name(int | None) == "an integer or none"
    assert type_name(Literal["a", "b"]) == "one of a, b"
    assert type_name(tuple[str, ...]) == "a list of text"
    assert type_name(tuple[tuple[int, float], ...]) == "a list of (an integer, a number)"


# ---- Recipes.


def build(name: str, **overrides: str) -> TrainConfig:
    return build_config(TrainConfig, load_recipe(name), overrides.items())


@pytest.mark.parametrize("name", recipe_names())
def test_recipe_by_name_and_path(name):
    config = build(name)
    assert build(str(recipe_folder() / f"{name}.py")) == config != TrainConfig()
    assert config.model.source


def test_train_defaults_have_help():
    assert build_config(TrainConfig, train_defaults()) == TrainConfig()
    assert all(line.split("  ", 1)[1].strip() for line in describe_config(TrainConfig()))


def test_recipes_of_the_paper():
    small, medium, large = map(build, ("diffugpt_s", "diffugpt_m", "diffullama_7b"))
    tokens = [c.num_steps * c.data.batch_size * c.data.length / 1e9 for c in (small, medium, large)]
    assert [round(t) for t in tokens] == [131, 210, 65]
    assert [c.objective.anneal_steps for c in (small, medium, large)] == [10_000, 10_000, 0]
    assert build("diffullama_7b_annealed").objective.anneal_steps > 0
    assert [c.model.default_mask_token for c in (small, medium, large)] == [10541, "<|mask|>", 811]
    assert all(c.objective.settle({}).shift for c in (small, medium, large))
    assert all(c.model.dtype == "bfloat16" and not c.data.train for c in (small, medium, large))
    gsm8k = build("sft_gsm8k_llama_lora")
    lora = gsm8k.lora
    assert (lora.rank, lora.embedding, lora.head, lora.targets) == (16, True, False, ("all",))
    assert (gsm8k.optimizer.learning_rate, gsm8k.model.default_mask_token, gsm8k.data.length) == (1e-4, 811, 256)


def test_fine_tuning_recipes():
    ours, parents, instruct = map(build, ("sft_gsm8k_gpt2", "sft_gsm8k_gpt2_ar", "sft_instruct"))
    assert ours.num_steps * ours.data.batch_size // 385_620 == 199  # epochs
    assert (ours.data.examples.train_on_padding, ours.data.examples.split_digits) == (True, True)
    changed = {field.name for field in dataclasses.fields(ours)
               if getattr(ours, field.name) != getattr(parents, field.name)}
    assert changed == {"model", "objective", "data", "validation"}
    assert (parents.objective.name, parents.model.source) == ("autoregressive", "gpt2-medium")
    assert (instruct.objective.loss_normalization, instruct.lora.rank, instruct.data.examples.format) == (
        "per_example", 16, "messages")
    assert all(config.objective.anneal_steps == 0 for config in (ours, parents, instruct))


def test_recipes_of_one_machine():
    full, blocks, lora = map(build, ("smollm2_135m", "smollm2_135m_blocks", "smollm2_135m_lora"))
    assert all(config.data == full.data and config.model == full.model for config in (blocks, lora))
    assert (blocks.objective.name, blocks.objective.block_size) == ("block_diffusion", 4)
    assert full.lora.rank == 0 < lora.lora.rank
    assert full.optimizer.learning_rate < lora.optimizer.learning_rate
    assert build("smollm2_135m_lora", **{"model.source": "x.gguf"}).model.source == "x.gguf"


@pytest.mark.parametrize(("content", "mentions"), [
    ("def get_config(:", "SyntaxError"),
    ("import nonsense_module", "nonsense_module"),
    ("x = 1", "get_config"),
    ("def get_config(): return {}", "ml_collections.ConfigDict"),
    ("def get_config():\n  raise ValueError('two\\nlines')", "ValueError: two lines"),
])
def test_broken_recipe(tmp_path, content, mentions):
    path = tmp_path / "mine.py"
    path.write_text(content)
    with pytest.raises(ConfigError, match=mentions) as caught:
        load_recipe(str(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_missing_recipe(tmp_path):
    (tmp_path / "mine.py").write_text("")
    (tmp_path / "mine.txt").write_text("")
    for name, mentions in ((tmp_path / "mime.py", "mine.py"), ("quikstart", "quickstart"),
                           (tmp_path / "mine.txt", "mine.txt")):
        with pytest.raises(ConfigError, match=mentions):
            load_recipe(str(name))
