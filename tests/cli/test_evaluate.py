"""`dlm evaluate --tasks`: a table of two models from local files, a resumed run, and refusals."""

import json
import pathlib

import pytest

from dlm_jax.cli import evaluate as evaluate_command
from dlm_jax.cli.main import main
from dlm_jax.errors import ConfigError
from dlm_jax.evaluation.code_execution import Sandbox
from dlm_jax.evaluation.tasks import TASKS

TASK_ROWS = {
    "piqa/valid.jsonl": [{"goal": f"The {animal} sat", "sol1": "on the mat", "sol2": "and saw Tom", "label": n % 2}
                         for n, animal in enumerate(("cat", "dog", "bird", "cat", "dog"))],
    "gsm8k/test.jsonl": [{"question": "The sun?", "answer": "#### 2"}, {"question": "Tom?", "answer": "#### 3"}],
    "gsm8k/train.jsonl": [{"question": "1?", "answer": "#### 1"}],
    "rocstories.jsonl": [{**{f"InputSentence{n}": "Tom." for n in range(1, 5)}, "RandomFifthSentenceQuiz1": "a",
                          "RandomFifthSentenceQuiz2": "b", "AnswerRightEnding": 1}],
    "mawps/test.jsonl": [{"question": "The cat?", "result": "1"}, {"question": "The dog?", "result": "2"}],
    "mawps/train.jsonl": [{"question": "The bird?", "result": "3"}],
    "satmath.jsonl": [{"question": "The sun?", "options": ["(A)cat", "(B)mat"], "label": "B"}],
    "humaneval_infilling/HumanEval-SingleLineInfilling.jsonl": [
        {"task_id": "SingleLineInfilling/HumanEval/0/L0", "entry_point": "f", "prompt": "def f():\n",
         "suffix": "    return 1\n", "canonical_solution": "    pass\n", "test": "def check(f): assert f() == 1\n"}],
    "text.jsonl": [{"text": "The cat sat on the mat and saw Tom, who was happy that the sun was warm."}],
}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    for name, rows in TASK_ROWS.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def evaluate(capsys, *argv):
    status = main(["evaluate", *map(str, argv)])
    return status, *capsys.readouterr()


def test_table_with_parent(capsys, model, data_dir, tmp_path):
    out = tmp_path / "results.json"
    arguments = (f"--model={model}", "--tasks=piqa,gsm8k,text", f"--data_dir={data_dir}", f"--parent={model}",
                 "--num_masks=3", "--num_steps=2", "--block_length=2", "--batch_size=4")
    status, table, err = evaluate(capsys, *arguments, f"--out={out}")
    assert status == 0, err
    assert "accuracy normalized" in table and "strict match" in table and "bits per byte" in table
    result = json.loads(out.read_text())
    assert result["tasks"]["piqa"]["items"] == 5 and len(result["records"]) == 2 * (5 + 2 + 1)
    assert result["settings"]["num_masks"] == 3 and result["settings"]["block_length"] == 2
    assert result["versions"]["jax"]
    assert set(result["tasks"]["text"]["differences"]) == {"bits_per_byte"}
    assert "| piqa | accuracy |" in out.with_suffix(".md").read_text()
    lines = [json.loads(line) for line in (tmp_path / "results.items.jsonl").read_text().splitlines()]
    assert lines == result["records"]
    status, _, err = evaluate(capsys, *arguments, f"--out={out}")
    assert status == 1 and "results.json" in err

    # A run that stopped after six items resumes to the same result.
    again = tmp_path / "again.json"
    partial = tmp_path / "again.items.jsonl.partial"
    partial.write_text("".join(json.dumps(line) + "\n" for line in lines[:6]) + '{"broken')
    partial.with_name(partial.name + ".json").write_text(json.dumps(result["settings"]))
    status, _, err = evaluate(capsys, *arguments, f"--out={again}")
    assert status == 0, err
    assert json.loads(again.read_text())["tasks"] == result["tasks"]


def test_generation_and_reconstruction(capsys, model, data_dir):
    arguments = (f"--model={model}", "--tasks=generation,reconstruction", f"--data_dir={data_dir}", "--num_steps=2",
                 "--json=-")
    status, out, err = evaluate(capsys, *arguments, f"--judge={model}")
    assert status == 0, err
    tasks = json.loads(out)["tasks"]
    assert {"generative_perplexity", "distinct_2", "words"} <= set(tasks["generation"]["models"][str(model)])
    assert next(iter(tasks["reconstruction"]["models"][str(model)])) == "10% masked"
    status, again, err = evaluate(capsys, *arguments, f"--parent={model}")
    assert status == 0, err
    of_parent = json.loads(again)["tasks"]
    name = f"{model} (parent)"
    assert set(of_parent["reconstruction"]["differences"]) == {f"{n}0% masked" for n in (1, 3, 5, 7, 9)}
    assert of_parent["generation"]["models"][str(model)] == tasks["generation"]["models"][str(model)]
    assert of_parent["generation"]["differences"] == {} and name in of_parent["generation"]["models"]
    status, _, err = evaluate(capsys, *arguments)
    assert status == 1 and "--judge" in err and "--parent" in err and err.count("\n") == 1


def test_named_dataset(capsys, model, tmp_path):
    """From a folder instead of the hub."""
    pytest.importorskip("datasets")
    (tmp_path / "data").mkdir()
    for name, rows in (("train", 1), ("validation", 4)):
        (tmp_path / "data" / f"{name}.jsonl").write_text("".join(
            json.dumps({"goal": f"The cat {n}", "sol1": "on the mat", "sol2": "saw", "label": 0}) + "\n"
            for n in range(rows)))
    spec = f"hf:{tmp_path / 'data'}?split=validation"
    status, out, err = evaluate(capsys, f"--model={model}", "--objective=autoregressive", "--tasks=piqa",
                                "--data_files", f"piqa={spec}", "--json=-")
    assert status == 0, err
    result = json.loads(out)
    assert result["tasks"]["piqa"]["items"] == 4
    assert result["settings"]["data"][0]["file"] == spec and len(result["settings"]["data"][0]["sha256"]) == 16


def test_reference_protocol_and_infilling(capsys, model, data_dir):
    status, out, err = evaluate(capsys, f"--model={model}", "--tasks=piqa,rocstories", f"--data_dir={data_dir}",
                                "--protocol=reference", "--json=-", "--limit=2")
    assert status == 0, err
    result = json.loads(out)
    assert result["settings"]["num_masks"] == 32 and result["tasks"]["piqa"]["items"] == 2
    assert list(result["tasks"]["piqa"]["models"][str(model)]) == ["accuracy"]
    assert list(result["tasks"]["rocstories"]["models"][str(model)]) == ["rouge1", "rouge2", "rougeL"]


def test_code_execution(capsys, model, data_dir):
    arguments = (f"--model={model}", "--tasks=humaneval_infilling", f"--data_dir={data_dir}", "--num_steps=2",
                 "--json=-")
    try:
        Sandbox()
    except ConfigError as error:
        pytest.skip(f"this machine cannot isolate programs: {error}")
    status, out, err = evaluate(capsys, *arguments, "--allow_code_execution", f"--parent={model}")
    assert status == 0, err
    result = json.loads(out)["tasks"]["humaneval_infilling"]
    assert result["items"] == 1 and [list(values) for values in result["models"].values()] == [["pass_at_1"]] * 2


def test_code_execution_refused(capsys, model, data_dir, monkeypatch):
    arguments = (f"--model={model}", "--tasks=humaneval_infilling", f"--data_dir={data_dir}")
    status, _, err = evaluate(capsys, *arguments)
    assert status == 1 and err.count("\n") == 1
    assert "--allow_code_execution" in err

    def fails(self):
        raise ConfigError("not isolated")

    monkeypatch.setattr(Sandbox, "_probe", fails)
    status, _, err = evaluate(capsys, *arguments, "--allow_code_execution")
    assert status == 1 and "not isolated" in err and err.count("\n") == 1


def test_samples_and_prompt_file(capsys, model, data_dir, tmp_path):
    prompt, out = tmp_path / "prompt.txt", tmp_path / "results.json"
    prompt.write_text("Question: Tom?\nAnswer: Let's think step by step. The answer is 3.\n")
    arguments = (f"--model={model}", "--tasks=mawps,mawps_cot,satmath", f"--data_dir={data_dir}", "--num_steps=2",
                 f"--prompt_file={prompt}", "--samples=2", "--temperature=0.8")
    status, table, err = evaluate(capsys, *arguments, f"--out={out}")
    assert status == 0, err
    assert "majority" in table and "hit" in table and "stated number" in table and "chosen letter" in table
    result = json.loads(out.read_text())
    assert result["settings"]["samples"] == 2 and result["settings"]["temperature"] == 0.8
    assert result["settings"]["prompt_file"] == str(prompt) and len(result["settings"]["prompt_sha256"]) == 16
    assert all(len(record["texts"]) == len(record["votes"]) == 2 for record in result["records"])
    status, other, err = evaluate(capsys, *arguments, "--batch_size=1", "--json=-")
    assert status == 0, err
    assert json.loads(other)["tasks"] == result["tasks"]


def test_help_names_every_task():
    named = evaluate_command.__doc__.partition("\nTasks: ")[2].replace("\n", " ")
    assert all(f" {task}," in f" {named}" or f" {task} (" in named or f" {task}." in named for task in TASKS)


@pytest.mark.parametrize(("arguments", "named"), [
    (("--tasks=piqa", "--protocol=reference", "--mc_estimator=time"), "--mc_estimator"),
    (("--tasks=gsm8k", "--samples=3"), "temperature"),
    (("--tasks=gsm8k", "--samples=0"), "--samples"),
    (("--tasks=mawps", "--protocol=reference"), "mawps"),
    (("--tasks=mawps", "--protocol=reference", "--prompt_file=x"), "--prompt_file"),
    (("--tasks=gsm8k", "--protocol=reference", "--num_steps=4"), "--num_steps"),
    (("--tasks=gsm8k", "--policy=surest"), "surest"),
    (("--tasks=gsm8k", "--policy=autoregressive"), "--objective=autoregressive"),
    (("--tasks=gsm8k", "--objective=autoregressive", "--block_length=8"), "--block_length"),
    (("--tasks=piqa", "--block_length=8"), "--block_length"),
    (("--data", "x.jsonl", "--policy=random"), "--policy"),
    (("--tasks=mawps", "--prompt_file=none.txt"), "none.txt"),
    (("--tasks=mawps", "--prompt_file=empty.txt"), "empty.txt"),
    (("--tasks=mawps", "--prompt_file=bytes.txt"), "bytes.txt"),
    (("--tasks=mawps", "--prompt_file=."), "no file ."),
    (("--tasks=mawps", "--prompt_file=empty.txt", "--shots=1"), "--shots"),
    (("--tasks=text", "--prompt_file=empty.txt"), "text"),
    (("--tasks=mawps_cot", "--shots=1"), "example 0"),
    (("--tasks=humaneval_infilling",), "--allow_code_execution"),
    (("--data", "x.jsonl", "--allow_code_execution"), "--tasks"),
    (("--data", "x.jsonl", "--samples=2"), "--tasks"),
    (("--tasks=lambada",), "lambada"),
    (("--tasks=piqa", "--data_files", "piqa=none.jsonl"), "none.jsonl"),
    (("--tasks=piqa", "--data_files", "gsm8k=x.jsonl"), "gsm8k"),
    (("--tasks=piqa", "--data_files", "piqa"), "TASK=FILE"),
    (("--tasks=piqa,piqa",), "piqa,piqa"),
    (("--tasks=piqa", "--limit=0"), "--limit"),
    (("--tasks=piqa", "--length=8"), "--length"),
    (("--data", "x.jsonl", "--limit=8"), "--data_dir"),
    (("--tasks=piqa", "--data", "x.jsonl"), "--examples"),
    (("--tasks=piqa", "--out=results.txt"), "results.txt"),
    (("--tasks=gsm8k", "--shots=2"), "--shots=2"),
    (("--tasks=piqa", "--shots=1"), "piqa"),
    (("--tasks=piqa", "--shots=1", "--protocol=reference"), "--shots"),
])
def test_refusals(capsys, model, data_dir, tmp_path, monkeypatch, arguments, named):
    monkeypatch.chdir(tmp_path)
    for name in ("x", "x.jsonl"):
        (tmp_path / name).touch()
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff")
    where = () if arguments[0] == "--data" and "--limit=8" not in arguments else (f"--data_dir={data_dir}",)
    status, _, err = evaluate(capsys, f"--model={model}", *where, *arguments)
    assert status == 1 and named in err and err.count("\n") == 1


@pytest.mark.parametrize(("argument", "new"), [
    ("--harness=piqa", "--lm_eval"), ("--harness_dir=tasks", "--lm_eval_dir"), ("--num_samples=3", "--num_masks"),
    ("--estimator=counts", "--mc_estimator"), ("--mc_estimator=counts", "mask_count"), ("--mc_estimator=times", "time"),
    ("--protocol=release", "reference")])
def test_old_names(capsys, argument, new):
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", "--model=x", argument])
    assert stopped.value.code == 2 and f"is now {new};" in capsys.readouterr().err


def test_missing_mask_token(capsys, data_dir):
    shipped = pathlib.Path(__file__).parents[2] / "assets" / "stories-gpt2"
    arguments = (f"--model={shipped}", "--tasks=piqa", f"--data_dir={data_dir}")
    status, _, err = evaluate(capsys, *arguments)
    assert status == 1 and "--mask_token" in err and err.count("\n") == 1
    status, _, err = evaluate(capsys, *arguments, "--objective=autoregressive", "--limit=1")
    assert status == 0, err
