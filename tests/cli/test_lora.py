"""A run with LoRA through the command line: trained, evaluated, exported merged and as an adapter, and refused."""

import json

import pytest

from dlm_jax.checkpoints import load_pretrained, save_pretrained
from dlm_jax.cli.main import main
from tests.cli.conftest import RECIPE
from tests.cli.test_commands import run


@pytest.fixture(scope="module")
def pretrained(base, tmp_path_factory):
    """The tiny base, with weights."""
    folder = tmp_path_factory.mktemp("pretrained") / "base"
    save_pretrained(folder, load_pretrained(base, init="random"))
    return folder


@pytest.fixture(scope="module")
def command(pretrained, text, tmp_path_factory):
    """The command that trains, without its workdir."""
    recipe = tmp_path_factory.mktemp("recipes") / "recipe.py"
    recipe.write_text(RECIPE + "    config.log.every = 1\n    return config\n")
    return ["train", f"--config={recipe}", f"--config.model.source={pretrained}", f"--config.data.train={text}",
            "--config.model.init=pretrained",
            "--config.num_steps=2", "--config.lora.rank=2", "--config.lora.targets=attn.c_proj,c_fc",
            "--config.optimizer.learning_rate=0.1", "--config.optimizer.schedule=constant"]


@pytest.fixture(scope="module")
def workdir(command, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    assert main([*command, f"--workdir={folder}"]) == 0
    return folder


def test_a_run_and_its_exports_are_one_model(capsys, workdir, pretrained, text, tmp_path):
    arguments = ("--data", text, "--length=16", "--num_rows=8", "--num_samples=4", "--json=-")
    of_run = json.loads(run(capsys, "evaluate", f"--model={workdir}", *arguments))["nats_per_token"]
    for layout in ("hf", "peft"):
        out = run(capsys, "export", f"--model={workdir}", f"--output={tmp_path / layout}", f"--layout={layout}")
        assert str(tmp_path / layout) in out
        exported = json.loads(run(capsys, "evaluate", f"--model={tmp_path / layout}", *arguments))["nats_per_token"]
        # the adapter's base is read as it is, where the run rounds what it does not train
        assert exported == pytest.approx(of_run, rel=1e-6 if layout == "hf" else 1e-2)
    named = ("evaluate", f"--model={tmp_path / 'peft'}", f"--base={pretrained}", *arguments)
    assert json.loads(run(capsys, *named))["nats_per_token"] == exported
    arguments = ("--infill=The <mask:3> sat.", "--num_steps=2", "--json=-")
    texts = [json.loads(run(capsys, "sample", f"--model={model}", *arguments))["samples"][0]["text"]
             for model in (workdir, tmp_path / "hf")]
    assert texts[0] == texts[1] and texts[0].startswith("The ") and texts[0].endswith(" sat.")


@pytest.mark.parametrize("changes, says", [
    (["--config.lora.targets=q_prj"], "lora.targets names 'q_prj'"), (["--config.lora.rank=1000"], "larger than the"),
    (["--config.lora.head=true"], "lora.embedding"), (["--config.lora.rnk=2"], "did you mean config.lora.rank")])
def test_what_cannot_be_trained_is_one_sentence(capsys, command, changes, says, tmp_path):
    assert main([*command, f"--workdir={tmp_path}", *changes]) == 1
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1


def test_what_is_no_adapter_is_one_sentence(capsys, pretrained, workdir, tmp_path):
    for arguments, says in (
            (("export", f"--model={pretrained}", f"--output={tmp_path}", "--layout=peft"), "not the workdir of a run"),
            (("sample", f"--model={pretrained}", "--base=gpt2", "--mask_token=3"), "is no adapter"),
            (("sample", f"--model={workdir}", "--base=gpt2"), "knows its base")):
        assert main([str(argument) for argument in arguments]) == 1
        err = capsys.readouterr().err
        assert says in err and err.count("\n") == 1
