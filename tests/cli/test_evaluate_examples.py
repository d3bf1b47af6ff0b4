"""`dlm evaluate --examples`: prompts, rows and metrics are those of the run's held-out examples."""

import json

import pytest

from dlm_jax.cli.main import main
from dlm_jax.training.metrics import read_records
from tests.cli.conftest import RECIPE


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Training lines, and eight others."""
    folder = tmp_path_factory.mktemp("sums")
    lines = [f"{a}+{b}?||#### {a + b}" for a in range(1, 10) for b in range(1, 10)]
    (folder / "train.txt").write_text("\n".join(lines[8:]))
    (folder / "test.txt").write_text("\n".join(lines[:8]))
    return folder


@pytest.fixture(scope="module", params=["diffusion", "autoregressive"])
def objective(request):
    return request.param


@pytest.fixture(scope="module")
def run(objective, base, files, tmp_path_factory):
    """Fine-tuned for a few steps, with the test lines held out."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "recipe.py").write_text(RECIPE + f"""
    config.num_steps = 4
    config.model.source = {str(base)!r}
    config.objective.name = {objective!r}
    config.optimizer.learning_rate = 0.01
    config.data.train = ({str(files / "train.txt")!r},)
    config.data.validation = ({str(files / "test.txt")!r},)
    config.data.examples.format = "gsm8k_symbolic"
    config.data.examples.train_on_padding = True
    config.validation.every = 4
    config.validation.num_generations = 8
    config.validation.generation_steps = 3
    return config
""")
    assert main(["train", f"--config={folder / 'recipe.py'}", f"--workdir={folder / 'run'}"]) == 0
    return folder / "run"


def test_values_of_the_run(run, objective, files, tmp_path, capsys):
    out = tmp_path / "answers.json"
    steps = ("--num_steps=3",) if objective == "diffusion" else ()
    assert main(["evaluate", f"--model={run}", "--examples", str(files / "test.txt"), *steps, "--num_masks=8",
                 f"--json={out}"]) == 0
    shown, result, (first, recorded) = (capsys.readouterr().out, json.loads(out.read_text()),
                                        read_records(run, "generation"))
    assert (first["step"], recorded["step"]) == (0, 4)
    assert result["num_examples"] == len(result["records"]) == 8 and result["length"] == 16
    for name in ("exact_match", "strict_match", "well_formed"):
        assert result["values"][name]["mean"] == recorded[name] and name in shown
    assert result["records"][0]["text"] == recorded["text"] and result["records"][0]["answer"] == "#### 2"
    bound = read_records(run, "validation")[-1]["bound"]
    assert result["nats_per_token"] == pytest.approx(bound, rel=0.2)


def test_limit_policies_and_refusals(run, objective, files, capsys):
    test = str(files / "test.txt")
    how = ("--policy=threshold", "--threshold=0.2", "--block_length=4")
    status = main(["evaluate", f"--model={run}", "--examples", test, "--limit=3", "--json=-", *how])
    out, err = capsys.readouterr()
    if objective == "diffusion":
        result = json.loads(out)
        assert (status, result["num_examples"], result["policy"], result["threshold"], result["block_length"]) == (
            0, 3, "threshold", 0.2, 4)
    else:
        assert status == 1 and "leave it out" in err
    for arguments, named in ((("--limit=0",), "--limit"),
                               (("--length=8",), "--length"),
                               (("--data", test), "--tasks")):
        assert main(["evaluate", f"--model={run}", "--examples", test, *arguments]) == 1
        assert named in capsys.readouterr().err


def test_model_without_examples_is_refused(model, files, capsys):
    assert main(["evaluate", f"--model={model}", "--examples", str(files / "test.txt")]) == 1
    assert str(model) in capsys.readouterr().err
