import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from etils import epath

from dlm_jax.checkpoints import load_pretrained
from dlm_jax.checkpoints.workdir import hold_workdir
from dlm_jax.data.config import ExampleConfig
from dlm_jax.data.prompts import prompt_format_from_run
from dlm_jax.diffusion import DiffusionSpec, ObjectiveConfig
from dlm_jax.errors import CheckpointError, ConfigError
from dlm_jax.parallel import make_mesh
from dlm_jax.training import train
from dlm_jax.training.config import ModelSource
from dlm_jax.training.setup import load_base


def test_workdir_as_base(short_config, tmp_path):
    """A diffusion run starts from an autoregressive run; its mask token must be in that vocabulary."""
    parent = dataclasses.replace(short_config, num_steps=1, objective=ObjectiveConfig(name="autoregressive"),
                                 model=dataclasses.replace(short_config.model, mask_token=None))
    train(parent, tmp_path / "parent")

    def open_base(mask_token):
        model = ModelSource(source=f"{tmp_path / 'parent'}@1", mask_token=mask_token)
        child = dataclasses.replace(short_config, model=model)
        return load_base(child, tmp_path / "child", make_mesh(child.mesh), resumed=False)[0]

    base = open_base("<unk>")
    assert base.diffusion == DiffusionSpec(10, missing_ids=base.diffusion.missing_ids)
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


HOLD = """
import sys
from etils import epath
from dlm_jax.checkpoints.workdir import hold_workdir
with hold_workdir(epath.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_workdir_is_held_by_one_process(tmp_path):
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                             text=True)
    assert other.stdout.readline() == "held\n"
    with pytest.raises(CheckpointError, match=f"process {other.pid} on "), hold_workdir(epath.Path(tmp_path)):
        pass
    other.kill()  # a lock ends with its process
    other.wait()
    with hold_workdir(epath.Path(tmp_path)), hold_workdir(epath.Path(tmp_path)):  # a process never locks itself out
        assert f"process {os.getpid()} on " in (tmp_path / ".lock").read_text()
