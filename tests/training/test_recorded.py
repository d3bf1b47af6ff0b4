"""What a source records of how it was trained is taken where a recipe leaves it open, and else must be what it says."""

import dataclasses
import json

import pytest

from dlm_jax.checkpoints import load_pretrained, save_pretrained
from dlm_jax.cli.config import build_config, load_recipe
from dlm_jax.data.config import DataConfig, ExampleConfig, OpenExamples
from dlm_jax.diffusion import BlockSpec, DiffusionSpec, ObjectiveConfig
from dlm_jax.diffusion.config import OpenObjective
from dlm_jax.errors import ConfigError
from dlm_jax.parallel import make_mesh
from dlm_jax.training import TrainConfig, train
from dlm_jax.training.config import ModelSource, flat_dict
from dlm_jax.training.recorded import settle_resumed
from dlm_jax.training.setup import load_base
from tests.training.conftest import changed


@pytest.fixture
def source(pretrained, tmp_path):
    """Exports the tiny base as a model that was trained so."""
    def export(diffusion=DiffusionSpec(10), **recipe):
        found = load_pretrained(pretrained, mask_token=diffusion.mask_token_id)
        recipe = {"data.packing": "concat", "data.add_bos": None} | recipe
        save_pretrained(tmp_path / "source", dataclasses.replace(
            found, diffusion=diffusion, recipe={name.replace("__", "."): value for name, value in recipe.items()}))
        return str(tmp_path / "source")
    return export


def settled(source, **settings):
    """Returns what a run from `source` trains with, where the recipe says nothing but `settings`."""
    config = TrainConfig(model=ModelSource(source=source), data=DataConfig(length=16, batch_size=16))
    for name, value in settings.items():
        config = changed(config, name.replace("__", "."), value)
    base, config = load_base(config, None, make_mesh(config.mesh), resumed=False)
    return base.diffusion, config


BLOCKS = BlockSpec(4, "block_bidirectional")


@pytest.mark.parametrize("diffusion", [
    DiffusionSpec(10), DiffusionSpec(5), DiffusionSpec(10, shift=False), DiffusionSpec(10, blocks=BLOCKS),
    DiffusionSpec(7, shift=False, blocks=BlockSpec(8))])
def test_what_is_recorded_is_taken(source, diffusion):
    found, config = settled(source(diffusion))
    assert dataclasses.replace(found, missing_ids=()) == diffusion
    assert config.objective.name == ("block_diffusion" if diffusion.blocks else "diffusion")


def test_default_where_nothing_is_recorded(pretrained):
    found, config = settled(str(pretrained))
    assert (found.mask_token_id, found.shift, found.blocks) == (11, True, None)
    assert (config.model.mask_token, config.objective) == ("<|mask|>", ObjectiveConfig())
    assert settled(str(pretrained), model__default_mask_token=3)[1].model.mask_token == 3
    assert settled(str(pretrained), objective__name="autoregressive")[0].mask_token_id is None


@pytest.mark.parametrize("key, value", [
    ("model.mask_token", 9), ("model.mask_token", "<|new|>"), ("objective.shift", True), ("objective.block_size", 8),
    ("objective.clean_attention", "causal"), ("objective.name", "diffusion")])
def test_what_is_said_otherwise_is_refused(source, key, value):
    with pytest.raises(ConfigError) as error:
        settled(path := source(DiffusionSpec(10, shift=False, blocks=BLOCKS)), **{key.replace(".", "__"): value})
    assert all(named in str(error.value) for named in (path, key, repr(value)))


def test_same_values_are_accepted(source):
    found, _ = settled(source(DiffusionSpec(10, blocks=BLOCKS)), model__mask_token=10, objective=ObjectiveConfig(
        "block_diffusion", block_size=4, clean_attention="block_bidirectional"))
    assert found.blocks == BLOCKS


def test_blocks_grow_from_the_recorded_size(source):
    path = source(DiffusionSpec(10, blocks=BLOCKS))
    found, _ = settled(path, objective=OpenObjective(block_size_schedule=((0, 4), (5, 16))))
    assert found.blocks == BlockSpec(16, "block_bidirectional")
    with pytest.raises(ConfigError, match="block_size"):
        settled(path, objective=OpenObjective(block_size_schedule=((0, 1), (5, 4))))


def test_autoregressive_run_from_blocks(source):
    assert settled(source(DiffusionSpec(10, blocks=BLOCKS)), objective__name="autoregressive")[0].blocks is None
    with pytest.raises(ConfigError, match="shift"):
        settled(source(DiffusionSpec(10, shift=False)), objective__name="autoregressive")


def examples(**settings):
    return OpenExamples("prompt_response", **settings)


def test_prompts_are_written_as_recorded(source):
    path = source(data__examples__format="gsm8k", data__examples__separator="=", data__examples__split_digits=True)
    _, config = settled(path, data__examples=examples())
    assert (config.data.examples.separator, config.data.examples.split_digits) == ("=", True)
    assert settled(path)[1].data.examples == ExampleConfig()  # running text has no prompts
    for said in (examples(separator="\n"), examples(split_digits=False), OpenExamples("alpaca")):
        with pytest.raises(ConfigError, match=r"data\.examples\."):
            settled(path, data__examples=said)


def test_other_chat_template_is_refused(source, tmp_path):
    file = tmp_path / "template"
    file.write_text("{% for m in messages %}{{ m.content }} {% endfor %}")
    path = source(data__examples__format="messages")
    with pytest.raises(ConfigError, match="chat_template"):
        settled(path, data__examples=OpenExamples("messages", chat_template=str(file)))


def test_position_0_is_as_recorded(tmp_path, pretrained, corpus):
    loaded = load_pretrained(pretrained, mask_token=10)
    loaded.tokenizer.bos_token = "a"
    for add_bos in (True, False):
        path = str(tmp_path / str(add_bos))
        save_pretrained(path, dataclasses.replace(loaded, recipe={"data.add_bos": add_bos, "data.packing": "concat"}))
        assert settled(path)[1].data.add_bos in (add_bos, None)
        assert settled(path, data__packing="document_mask")[1].data.add_bos in (add_bos, None)
        with pytest.raises(ConfigError, match=r"data\.add_bos"):
            settled(path, data__add_bos=not add_bos)


def test_run_goes_on_with_what_it_has_taken(source, corpus, tmp_path):
    config = TrainConfig(num_steps=1, model=ModelSource(source=source(DiffusionSpec(10, blocks=BLOCKS))),
                         data=DataConfig(train=(str(corpus),), length=16, batch_size=8, validation_fraction=0.0))
    config = changed(changed(config, "validation.every", 0), "log.tensorboard", False)
    train(config, tmp_path / "run")
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (saved["objective.block_size"], saved["objective.name"]) == (4, "block_diffusion")
    assert train(dataclasses.replace(config, num_steps=2), tmp_path / "run")["changes"] == ["num_steps: 1 -> 2"]
    found, _ = settled(str(tmp_path / "run"))
    assert dataclasses.replace(found, missing_ids=()) == DiffusionSpec(10, blocks=BLOCKS)
    for key in ("objective.block_size", "model.mask_token"):
        with pytest.raises(ConfigError, match=key):
            settled(str(tmp_path / "run"), **{key.replace(".", "__"): 5})


@pytest.mark.parametrize("recipe", ["quickstart", "sft_instruct", "sft_gsm8k_llama_lora"])
def test_recipes_take_what_is_recorded(source, recipe):
    config = build_config(TrainConfig, load_recipe(recipe), [
        ("model.source", source(DiffusionSpec(5, shift=False))), ("data.length", "16"), ("data.batch_size", "16"),
        ("lora.rank", "0"),
        ("model.dtype", "float32")])
    _, found = load_base(config, None, make_mesh(config.mesh), resumed=False)
    assert flat_dict(found)["objective.shift"] is False and found.model.mask_token is None


def test_recipe_that_was_settled_before_is_unchanged():
    config = settle_resumed(TrainConfig(), {})
    assert settle_resumed(config, {"objective.shift": False, "data.examples.separator": "="}) == config
