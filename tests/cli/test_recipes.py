"""Every recipe builds, and what is wrong with one is said in a sentence."""

import dataclasses

import pytest

from dlm_jax.cli.config import build_config, describe_config
from dlm_jax.cli.config import load_recipe, recipe_folder, recipe_names, train_defaults
from dlm_jax.errors import ConfigError
from dlm_jax.training.config import TrainConfig


def build(name: str, **overrides: str) -> TrainConfig:
    return build_config(TrainConfig, load_recipe(name), overrides.items())


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_builds_by_name_and_by_path(name):
    config = build(name)
    assert build(str(recipe_folder() / f"{name}.py")) == config != TrainConfig()
    assert config.model.source


def test_defaults_are_the_dataclass_and_all_have_a_meaning():
    assert build_config(TrainConfig, train_defaults()) == TrainConfig()
    assert all(line.split("  ", 1)[1].strip() for line in describe_config(TrainConfig()))


def test_recipes_have_the_settings_of_the_paper():
    small, medium, large = map(build, ("diffugpt_s", "diffugpt_m", "diffullama_7b"))
    tokens = [c.num_steps * c.data.batch_size * c.data.length / 1e9 for c in (small, medium, large)]
    assert [round(t) for t in tokens] == [131, 210, 65]
    assert [c.objective.anneal_steps for c in (small, medium, large)] == [10_000, 10_000, 0]
    assert build("diffullama_7b_annealed").objective.anneal_steps > 0
    assert [c.model.mask_token for c in (small, medium, large)] == [10541, "<|mask|>", 811]
    assert all(c.objective.shift and c.model.dtype == "bfloat16" and not c.data.train for c in (small, medium, large))


def test_the_recipe_with_lora_has_the_settings_of_the_paper():
    config = build("sft_gsm8k_llama_lora")
    lora = config.lora
    assert (lora.rank, lora.embedding, lora.head, lora.targets) == (16, True, False, ("all",))
    assert config.optimizer.learning_rate == 1e-4 and config.model.mask_token == 811 and config.data.length == 256
    assert build("sft_gsm8k_llama_lora", **{"lora.rank": "8", "lora.targets": "q,v"}).lora.targets == ("q", "v")


def test_the_recipes_of_fine_tuning_differ_where_they_say():
    ours, parents, talks = map(build, ("sft_gsm8k_gpt2", "sft_gsm8k_gpt2_ar", "sft_instruct"))
    assert ours.num_steps * ours.data.batch_size // 385_620 == 199  # epochs
    assert (ours.data.examples.train_on_padding, ours.data.examples.split_digits) == (True, True)
    changed = {"model", "objective", "data", "validation"}
    assert {field.name for field in dataclasses.fields(ours)
            if getattr(ours, field.name) != getattr(parents, field.name)} == changed
    assert (parents.objective.name, parents.model.source) == ("autoregressive", "gpt2-medium")
    assert (talks.objective.loss_normalization, talks.lora.rank, talks.data.examples.format) == ("per_example", 16, "messages")
    assert all(config.objective.anneal_steps == 0 for config in (ours, parents, talks))


def test_combinations_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match="batch_size"):
        build("quickstart", **{"data.batch_size": "30", "optimizer.accumulate_steps": "4"})


@pytest.mark.parametrize(("content", "says"), [
    ("def get_config(:", "SyntaxError"),
    ("import nonsense_module", "nonsense_module"),
    ("x = 1", "get_config"),
    ("def get_config(): return {}", "ml_collections.ConfigDict"),
    ("def get_config():\n  raise ValueError('two\\nlines')", "ValueError: two lines"),
])
def test_a_recipe_that_fails_is_named(tmp_path, content, says):
    path = tmp_path / "mine.py"
    path.write_text(content)
    with pytest.raises(ConfigError, match=says) as caught:
        load_recipe(str(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_recipe_that_is_not_there_is_named_with_the_nearest(tmp_path):
    (tmp_path / "mine.py").write_text("")
    with pytest.raises(ConfigError, match="did you mean .*mine.py"):
        load_recipe(str(tmp_path / "mime.py"))
    with pytest.raises(ConfigError, match="did you mean quickstart"):
        load_recipe("quikstart")
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(ConfigError, match="not a Python file"):
        load_recipe(str(tmp_path / "mine.txt"))
