import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from dlm_jax.checkpoints import is_workdir, load_pretrained
from dlm_jax.checkpoints.workdir import split_step
from dlm_jax.data.config import ExampleConfig
from dlm_jax.data.prompts import prompt_format_from_run
from dlm_jax.errors import CheckpointError, ConfigError
from dlm_jax.parallel import make_mesh
from dlm_jax.training import train
from dlm_jax.training.config import ObjectiveConfig, ValidationConfig
from dlm_jax.training.setup import load_base


@pytest.mark.parametrize("path, expected", [
    ("runs/a@500", (Path("runs/a"), "500")), ("runs/a@best", (Path("runs/a"), "best")),
    ("runs/a", (Path("runs/a"), None)),
    ("me@home/a", (Path("me@home/a"), None)), ("runs/a@last", (Path("runs/a@last"), None))])
def test_a_step_is_split_off(path, expected):
    assert split_step(path) == expected


def test_a_directory_named_like_a_step_is_a_directory(tmp_path):
    (tmp_path / "a@5").mkdir()
    assert split_step(tmp_path / "a@5") == (tmp_path / "a@5", None)


def test_what_is_no_workdir_is_refused(tmp_path):
    assert not is_workdir(tmp_path) and not is_workdir("gpt2")
    with pytest.raises(CheckpointError, match="config.json"):
        load_pretrained(tmp_path)


def test_a_run_starts_from_another_runs_workdir(config, tmp_path):
    """An autoregressive run gives the base of a diffusion run, which needs a token of its vocabulary as mask."""
    parent = dataclasses.replace(config, num_steps=1, objective=ObjectiveConfig(name="autoregressive"),
                                 model=dataclasses.replace(config.model, mask_token=None),
                                 validation=ValidationConfig(every=0))
    train(parent, tmp_path / "parent")
    child = lambda token: dataclasses.replace(config, model=dataclasses.replace(  # noqa: E731
        config.model, source=f"{tmp_path / 'parent'}@1", init="pretrained", mask_token=token))
    base = load_base(child("<unk>"), tmp_path / "child", make_mesh(config.mesh), resumed=False)
    assert base.mask_token_id == 10 and base.shift
    stored = load_pretrained(tmp_path / "parent").model
    np.testing.assert_array_equal(base.model.embed.embedding[...], stored.embed.embedding[...])
    with pytest.raises(ConfigError, match="export it first"):
        load_base(child("<mask>"), tmp_path / "child", make_mesh(config.mesh), resumed=False)
    with pytest.raises(ConfigError, match="no mask token"):
        load_base(child(None), tmp_path / "child", make_mesh(config.mesh), resumed=False)


def test_a_run_on_conversations_keeps_its_chat_template(config, tmp_path):
    """In its tokenizer, so that the model is asked as it learnt when the file is gone, resumed and started from too."""
    template, talks = tmp_path / "chat.jinja", tmp_path / "talks.jsonl"
    template.write_text("{% for m in messages %}{{ m.content }} {% endfor %}")
    talks.write_text(16 * (json.dumps({"messages": [{"role": "user", "content": "abc"},
                                                    {"role": "assistant", "content": "de"}]}) + "\n"))
    examples = ExampleConfig(format="messages", chat_template=str(template))
    data = dataclasses.replace(config.data, train=(str(talks),), examples=examples, validation_fraction=0.0)
    run = dataclasses.replace(config, num_steps=1, data=data, validation=ValidationConfig(every=0))
    train(run, tmp_path / "run")
    train(dataclasses.replace(run, num_steps=2), tmp_path / "run")
    said = template.read_text()
    template.unlink()
    learnt = load_pretrained(tmp_path / "run")
    prompt_format = prompt_format_from_run(learnt.tokenizer, learnt.recipe, 32)
    assert prompt_format.config == dataclasses.replace(examples, chat_template=None) and learnt.tokenizer.chat_template == said
    assert learnt.tokenizer.decode(prompt_format.encode_prompt("cab")) == "<eos>cab "
