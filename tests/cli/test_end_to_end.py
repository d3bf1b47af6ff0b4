"""Train, sample, evaluate and export through the command line, with all parameters and with LoRA."""

import json
import math
import pathlib

import pytest

from dlm_jax.checkpoints import load_pretrained, save_pretrained
from dlm_jax.cli.main import main
from tests.cli.conftest import RECIPE

SCORED = ("--length=16", "--num_rows=8", "--num_masks=4", "--json=-")


def run(capsys, *argv: object) -> str:
    """Returns the standard output of a command that succeeds."""
    status = main([str(argument) for argument in argv])
    out, err = capsys.readouterr()
    assert status == 0, err
    return out


def refused(capsys, *argv: object) -> str:
    """Returns the sentence of a command that is refused."""
    assert main([str(argument) for argument in argv]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    return err


def nats(capsys, model: object, text: pathlib.Path, *arguments: object) -> float:
    result = json.loads(run(capsys, "evaluate", f"--model={model}", "--data", text, *SCORED, *arguments))
    return result["nats_per_token"]


@pytest.fixture(scope="module")
def pretrained(base, tmp_path_factory):
    """The tiny base, with weights."""
    folder = tmp_path_factory.mktemp("pretrained") / "base"
    save_pretrained(folder, load_pretrained(base, init="random"))
    return folder


@pytest.fixture(scope="module")
def train(pretrained, text, tmp_path_factory):
    """The command that trains, without its workdir and number of steps."""
    recipe = tmp_path_factory.mktemp("recipe") / "recipe.py"
    recipe.write_text(RECIPE +
                      "    config.model.init = 'pretrained'\n"
                      "    config.log.every = 1\n"
                      "    config.validation.every = 2\n"
                      "    config.validation.num_rows = 8\n"
                      "    config.data.validation_fraction = 0.2\n"
                      "    return config\n")
    return ["train", f"--config={recipe}", f"--config.model.source={pretrained}", f"--config.data.train={text}"]


@pytest.fixture(scope="module")
def lora(train):
    return [*train, "--config.num_steps=2", "--config.lora.rank=2", "--config.lora.targets=attn.c_proj,c_fc",
            "--config.optimizer.learning_rate=0.1", "--config.optimizer.schedule=constant"]


@pytest.fixture(scope="module")
def workdir(train, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    assert main([*train, f"--workdir={folder}", "--config.num_steps=3"]) == 0
    return folder


@pytest.fixture(scope="module")
def lora_workdir(lora, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora") / "run"
    assert main([*lora, f"--workdir={folder}"]) == 0
    return folder


def test_sample_a_workdir(capsys, workdir, tmp_path):
    path = tmp_path / "samples.json"
    arguments = ("sample", f"--model={workdir}", "--max_new_tokens=6", "--num_steps=3", "--num_samples=2", "--seed=5")
    out = run(capsys, *arguments, "--prompt", "The cat", "A dog", f"--json={path}")
    result = json.loads(path.read_text())
    assert [sample["prompt"] for sample in result["samples"]] == ["The cat", "The cat", "A dog", "A dog"]
    assert all(sample["text"].startswith(sample["prompt"]) and sample["text"] in out for sample in result["samples"])
    assert result["num_steps"] == 3 and result["seed"] == 5
    again = json.loads(run(capsys, *arguments, "--prompt", "The cat", "A dog", "--json=-"))
    assert again["samples"] == result["samples"]
    filled = json.loads(run(capsys, *arguments, "--infill", "The <mask:3> sat.", "--json=-"))
    assert all(sample["text"].startswith("The ") and sample["text"].endswith(" sat.") for sample in filled["samples"])


def test_exports_are_the_model(capsys, workdir, text, tmp_path):
    arguments = ("evaluate", f"--model={workdir}@3", "--data", text, *SCORED)
    of_run = json.loads(run(capsys, *arguments))
    assert of_run["num_rows"] == 8 and of_run["num_tokens"] == 8 * 15
    assert 0 < of_run["standard_error"] < of_run["nats_per_token"]
    assert of_run["perplexity"] == pytest.approx(math.exp(of_run["nats_per_token"]))
    for layout in ("hf", "diffugpt"):
        out = run(capsys, "export", f"--model={workdir}@3", f"--output={tmp_path / layout}", f"--layout={layout}")
        assert str(tmp_path / layout) in out
        assert nats(capsys, tmp_path / layout, text) == of_run["nats_per_token"]
    causal = (*arguments, "--objective=autoregressive")
    exact = json.loads(run(capsys, *causal))
    assert exact["standard_error"] == 0 and exact["nats_per_token"] != of_run["nats_per_token"]
    assert f"{exact['nats_per_token']:.4f}" in run(capsys, *[each for each in causal if each != "--json=-"])


def test_resume(capsys, train, workdir):
    records = (workdir / "metrics.jsonl").read_text()
    run(capsys, *train, f"--workdir={workdir}", "--config.num_steps=3")
    assert (workdir / "metrics.jsonl").read_text() == records
    assert "num_steps: 3 -> 4" in run(capsys, *train, f"--workdir={workdir}", "--config.num_steps=4")
    assert "seed: 0 -> 1" in refused(capsys, *train, f"--workdir={workdir}", "--config.num_steps=5", "--config.seed=1")


def test_lora_exports_are_the_model(capsys, lora_workdir, pretrained, text, tmp_path):
    of_run = nats(capsys, lora_workdir, text)
    for layout in ("hf", "peft"):
        run(capsys, "export", f"--model={lora_workdir}", f"--output={tmp_path / layout}", f"--layout={layout}")
        exported = nats(capsys, tmp_path / layout, text)
        # The adapter's base is read as it is, where the run rounds what it does not train.
        assert exported == pytest.approx(of_run, rel=1e-6 if layout == "hf" else 1e-2)
    assert nats(capsys, tmp_path / "peft", text, f"--base={pretrained}") == exported


def test_errors(capsys, workdir, lora_workdir, pretrained, text, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    for arguments, mentions in (
            (("evaluate", f"--model={workdir}", "--data", text, "--length=64"), "32 tokens"),
            (("evaluate", f"--model={workdir}", "--data", tmp_path / "empty.jsonl"), "text"),
            (("evaluate", f"--model={workdir}", "--data", tmp_path / "none.jsonl"), "none.jsonl"),
            (("sample", f"--model={workdir}@77"), "77"),
            (("sample", f"--model={workdir}", "--json=no/such/folder/x.json", "--max_new_tokens=2"), "no/such/folder"),
            (("sample", f"--model={workdir}", "--max_new_tokens=500"), "32"),
            (("train", "--config=quickstart", f"--config.data.train={text}", f"--workdir={text}"), str(text)),
            (("export", f"--model={text}", f"--output={tmp_path / 'out'}"), str(text)),
            (("export", f"--model={pretrained}", f"--output={tmp_path / 'out'}", "--layout=peft"), str(pretrained)),
            (("sample", f"--model={pretrained}", "--base=gpt2", "--mask_token=3"), "adapter"),
            (("sample", f"--model={lora_workdir}", "--base=gpt2"), "base")):
        assert mentions in refused(capsys, *arguments)


@pytest.mark.parametrize(("override", "mentions"), [
    ("--config.lora.targets=q_prj", "lora.targets"), ("--config.lora.rank=1000", "rank"),
    ("--config.lora.head=true", "lora.embedding"), ("--config.lora.rnk=2", "config.lora.rank")])
def test_bad_lora_settings(capsys, lora, override, mentions, tmp_path):
    assert mentions in refused(capsys, *lora, f"--workdir={tmp_path}", override)
