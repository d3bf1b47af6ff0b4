"""Train, sample, evaluate and export, through the command line."""

import json
import math

import pytest

from dlm_jax.cli.main import main
from tests.cli.conftest import RECIPE


def run(capsys, *argv: object) -> str:
    """Standard output of a command that succeeds."""
    status = main([str(argument) for argument in argv])
    out, err = capsys.readouterr()
    assert status == 0, err
    return out


@pytest.fixture(scope="module")
def workdir(base, text, tmp_path_factory):
    """A short diffusion run on the tiny base."""
    folder = tmp_path_factory.mktemp("run")
    recipe = folder / "recipe.py"
    recipe.write_text(
        RECIPE +
        "    config.log.every = 1\n"
        "    config.validation.every = 2\n"
        "    config.validation.num_rows = 8\n"
        "    return config\n")
    arguments = ["train", "--config.num_steps=3", f"--config.model.source={base}", f"--workdir={folder / 'run'}",
                 f"--config={recipe}", f"--config.data.train={text}", "--config.data.validation_fraction=0.2"]
    assert main(arguments) == 0
    return folder / "run"


def test_training_leaves_a_workdir_that_samples(capsys, workdir, tmp_path):
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


def test_evaluation_of_a_step_and_of_its_exports(capsys, workdir, text, tmp_path):
    arguments = ("--data", text, "--length=16", "--num_rows=8", "--num_samples=4", "--json=-")
    of_run = json.loads(run(capsys, "evaluate", f"--model={workdir}@3", *arguments))
    assert of_run["num_rows"] == 8 and of_run["num_tokens"] == 8 * 15
    assert 0 < of_run["standard_error"] < of_run["nats_per_token"]
    assert of_run["perplexity"] == pytest.approx(math.exp(of_run["nats_per_token"]))
    for layout in ("hf", "diffugpt"):
        out = run(capsys, "export", f"--model={workdir}@3", f"--output={tmp_path / layout}", f"--layout={layout}")
        assert str(tmp_path / layout) in out
        exported = json.loads(run(capsys, "evaluate", f"--model={tmp_path / layout}", *arguments))
        assert exported["nats_per_token"] == of_run["nats_per_token"]
    causal = ("evaluate", f"--model={workdir}", "--objective=autoregressive", *arguments)
    exact = json.loads(run(capsys, *causal))
    assert exact["standard_error"] == 0 and exact["nats_per_token"] != of_run["nats_per_token"]
    table = run(capsys, *causal[:-1])
    assert f"{exact['nats_per_token']:.4f}" in table


def test_the_same_command_has_nothing_left_to_do_and_more_steps_resume(capsys, workdir, base, text):
    recipe = workdir.parent / "recipe.py"
    arguments = ("train", f"--config={recipe}", f"--workdir={workdir}", f"--config.model.source={base}",
                 f"--config.data.train={text}", "--config.data.validation_fraction=0.2")
    records = (workdir / "metrics.jsonl").read_text()
    run(capsys, *arguments, "--config.num_steps=3")
    assert (workdir / "metrics.jsonl").read_text() == records
    out = run(capsys, *arguments, "--config.num_steps=4")
    assert "num_steps: 3 -> 4" in out
    assert main([*arguments, "--config.num_steps=5", "--config.seed=1"]) == 1
    err = capsys.readouterr().err
    assert "seed: 0 -> 1" in err and err.count("\n") == 1


def test_what_does_not_fit_is_one_sentence(capsys, workdir, text, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    for arguments, says in (
            (("evaluate", f"--model={workdir}", "--data", text, "--length=64"), "32 tokens"),
            (("evaluate", f"--model={workdir}", "--data", tmp_path / "empty.jsonl"), "text"),
            (("evaluate", f"--model={workdir}", "--data", tmp_path / "none.jsonl"), "none.jsonl"),
            (("sample", f"--model={workdir}@77"), "77"),
            (("sample", f"--model={workdir}", "--json=no/such/folder/x.json", "--max_new_tokens=2"), "no/such/folder"),
            (("sample", f"--model={workdir}", "--max_new_tokens=500"), "32"),
            (("train", "--config=quickstart", f"--config.data.train={text}", f"--workdir={text}"), str(text)),
            (("export", f"--model={text}", f"--output={tmp_path}"), str(text))):
        assert main([str(argument) for argument in arguments]) == 1
        err = capsys.readouterr().err
        assert says in err and err.count("\n") == 1, err
