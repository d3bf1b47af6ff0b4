import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from dlm_jax.checkpoints import is_workdir, load_pretrained
from dlm_jax.checkpoints.workdir import split_step
from dlm_jax.data.config import ExampleConfig
from dlm_jax.data.prompts import prompt_format_from_run
from dlm_jax.diffusion import DiffusionSpec, ObjectiveConfig
from dlm_jax.errors import CheckpointError, ConfigError
from dlm_jax.parallel import make_mesh
from dlm_jax.training import train
from dlm_jax.training.config import ModelSource
from dlm_jax.training.setup import load_base


@pytest.mark.parametrize("path, expected", [
    ("runs/a@500", (Path("runs/a"), "500")), ("runs/a@best", (Path("runs/a"), "best")),
    ("runs/a", (Path("runs/a"), None)),
    ("me@home/a", (Path("me@home/a"), None)), ("runs/a@last", (Path("runs/a@last"), None))])
def test_split_step(path, expected):
    assert split_step(path) == expected


def test_split_step_of_a_directory_with_at_sign(tmp_path):
    (tmp_path / "a@5").mkdir()
    assert split_step(tmp_path / "a@5") == (tmp_path / "a@5", None)


def test_other_directories_are_no_workdirs(tmp_path):
    assert not is_workdir(tmp_path) and not is_workdir("gpt2")
    with pytest.raises(CheckpointError, match="config.json"):
        load_pretrained(tmp_path)


def test_workdir_as_base(short_config, tmp_path):
    """A diffusion run starts from an autoregressive run; its mask token must be in that vocabulary."""
    parent = dataclasses.replace(short_config, num_steps=1, objective=ObjectiveConfig(name="autoregressive"),
                                 model=dataclasses.replace(short_config.model, mask_token=None))
    train(parent, tmp_path / "parent")

    def open_base(mask_token):
        model = ModelSource(source=f"{tmp_path / 'parent'}@1", mask_token=mask_token)
        child = dataclasses.replace(short_config, model=model)
        return load_base(child, tmp_path / "child", make_mesh(child.mesh), resumed=False)

    base = open_base("<unk>")
    assert base.diffusion == DiffusionSpec(10)
    stored = load_pretrained(tmp_path / "parent").model
    np.testing.assert_array_equal(base.model.embed.embedding[...], stored.embed.embedding[...])
    for mask_token in ("<mask>", None):
        with pytest.raises(ConfigError, match="mask"):
            open_base(mask_token)


def test_chat_template_is_kept(short_config, tmp_path):
    """In the tokenizer of the workdir, also after a resume and without the file."""
    template, talks = tmp_path / "chat.jinja", tmp_path / "talks.jsonl"
    template.write_text("{% for m in messages %}{{ m.content }} {% endfor %}")
    talks.write_text(16 * (json.dumps({"messages": [{"role": "user", "content": "abc"},
                                                    {"role": "assistant", "content": "de"}]}) + "\n"))
    examples = ExampleConfig(format="messages", chat_template=str(template))
    data = dataclasses.replace(short_config.data, train=(str(talks),), examples=examples, validation_fraction=0.0)
    for num_steps in (1, 2):
        train(dataclasses.replace(short_config, num_steps=num_steps, data=data), tmp_path / "run")
    content = template.read_text()
    template.unlink()
    trained = load_pretrained(tmp_path / "run")
    prompt_format = prompt_format_from_run(trained.tokenizer, trained.recipe, 32)
    assert prompt_format.config == dataclasses.replace(examples, chat_template=None)
    assert trained.tokenizer.chat_template == content
    assert trained.tokenizer.decode(prompt_format.encode_prompt("cab")) == "<eos>cab "
