"""`dlm evaluate --tasks`: a table of two models from local files, a resumed run, and refusals."""

import argparse
import json
import pathlib
import sys

import pytest
import yaml

from dlm_jax.cli.evaluate_tasks import sampler_of
from dlm_jax.cli.main import main
from dlm_jax.evaluation.code_eval import Sandbox
from dlm_jax.sampling import SamplerConfig

TASK_ROWS = {
    "piqa/valid.jsonl": [{"goal": f"The {animal} sat", "sol1": "on the mat", "sol2": "and saw Tom", "label": n % 2}
                         for n, animal in enumerate(("cat", "dog", "bird", "cat", "dog"))],
    "piqa/train.jsonl": [{"goal": "The sun", "sol1": "saw Tom", "sol2": "sat", "label": 1}],
    "gsm8k/test.jsonl": [{"question": "The sun?", "answer": "#### 2"}, {"question": "Tom?", "answer": "#### 3"}],
    "rocstories.jsonl": [{**{f"InputSentence{n}": "Tom." for n in range(1, 5)}, "RandomFifthSentenceQuiz1": "a",
                          "RandomFifthSentenceQuiz2": "b", "AnswerRightEnding": 1}],
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


def test_a_model_generates_by_its_own_settings():
    arguments = argparse.Namespace(policy=None, num_steps=None, threshold=None, block_length=None, drafter=None)
    own = {"policy": "entropy", "num_steps": 512, "temperature": 0.2, "top_p": 0.95}
    assert sampler_of(arguments, False, own) == SamplerConfig("entropy", 512, temperature=0.0, top_p=0.95)
    arguments.num_steps, arguments.block_length = 8, 4
    assert sampler_of(arguments, False, own) == SamplerConfig("entropy", 8, block_length=4, temperature=0.0, top_p=0.95)
    arguments.num_steps, arguments.threshold = None, 0.7
    found = sampler_of(arguments, False, own)
    assert (found.policy, found.threshold, found.block_length) == ("threshold", 0.7, 4)
    arguments.threshold = None
    assert sampler_of(arguments, False, {"policy": "autoregressive"}).policy == "confidence"  # it drafts for itself
    arguments.block_length = None
    assert sampler_of(arguments, True, own) == SamplerConfig("autoregressive", temperature=0.0)


def test_table_with_parent(capsys, model, data_dir, tmp_path):
    out = tmp_path / "results.json"
    arguments = (f"--model={model}", "--tasks=piqa,gsm8k,text,rocstories", f"--data_dir={data_dir}", "--num_fewshot=0",
                 f"--parent={model}", "--num_masks=3", "--num_steps=2", "--block_length=2", "--batch_size=4")
    status, table, err = evaluate(capsys, *arguments, f"--out={out}")
    assert status == 0 and not err, err
    assert "acc norm" in table and "exact match, strict-match" in table and "bits per byte" in table
    assert "tokens per pass" in table and "gsm8k asks for texts of 256 tokens" in table
    result = json.loads(out.read_text())
    assert result["tasks"]["piqa"]["items"] == 5 and result["tasks"]["text"]["metrics"]["bits_per_byte"]["difference"]
    assert result["settings"]["num_masks"] == 3 and result["settings"]["block_length"] == 2
    assert result["versions"]["lm-eval"] and len(result["settings"]["data"]) == 5
    assert "| piqa | acc |" in out.with_suffix(".md").read_text()
    assert "<table>" in out.with_suffix(".html").read_text()
    lines = [json.loads(line) for line in (tmp_path / "results.items.jsonl").read_text().splitlines()]
    assert len(lines) == 2 * (5 + 2 * 2 + 1 + 1)  # gsm8k has two filters
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "results.html", "results.items.jsonl", "results.json", "results.md"]
    status, _, err = evaluate(capsys, *arguments, f"--out={out}")
    assert status == 1 and "results.json" in err

    # A stopped run resumes; with other settings it is refused.
    again, partial = tmp_path / "again.json", tmp_path / "again.answers.jsonl.partial"
    answers = {f"loglikelihood piqa {n} 0 {option}": {"halves": [-5.0 - option] * 2, "is_greedy": False}
               for n in range(5) for option in range(2)}
    partial.write_text(json.dumps({"model": str(model), "answers": answers}) + '\n{"broken')
    partial.with_name(partial.name + ".json").write_text(json.dumps(result["settings"]))
    status, _, err = evaluate(capsys, *arguments, "--seed=1", f"--out={again}")
    assert status == 1 and "seed" in err
    status, _, err = evaluate(capsys, *arguments, f"--out={again}")
    assert status == 0, err
    assert json.loads(again.read_text())["tasks"]["piqa"]["metrics"]["acc"]["models"][str(model)]["mean"] == 0.6
    assert not partial.exists()


def test_generation_and_reconstruction(capsys, model, data_dir):
    arguments = (f"--model={model}", "--tasks=generation,reconstruction", f"--data_dir={data_dir}", "--num_steps=2",
                 "--json=-")
    status, out, err = evaluate(capsys, *arguments, f"--judge={model}")
    assert status == 0, err
    tasks = json.loads(out)["tasks"]
    assert {"generative_perplexity", "distinct_2", "words"} == set(tasks["generation"]["metrics"]) - {
        "distinct_1", "distinct_3"}
    assert list(tasks["reconstruction"]["metrics"]) == [f"{n}0% masked" for n in (1, 3, 5, 7, 9)]
    status, again, err = evaluate(capsys, *arguments, f"--parent={model}")
    assert status == 0, err
    of_parent = json.loads(again)["tasks"]
    for name, metric in tasks["generation"]["metrics"].items():
        assert of_parent["generation"]["metrics"][name]["models"][str(model)] == metric["models"][str(model)]
    status, _, err = evaluate(capsys, *arguments)
    assert status == 1 and "--judge" in err and "--parent" in err and err.count("\n") == 1


def test_named_dataset(capsys, model, tmp_path):
    """From a folder instead of the hub."""
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


def test_reference_protocol(capsys, model, data_dir):
    status, out, err = evaluate(capsys, f"--model={model}", "--tasks=diffullama_piqa,diffullama_rocstories",
                                f"--data_dir={data_dir}", f"--parent={model}", "--json=-", "--limit=2")
    assert status == 0, err
    result = json.loads(out)
    assert result["settings"]["num_masks"] == 32 and result["tasks"]["diffullama_piqa"]["items"] == 2
    assert list(result["tasks"]["diffullama_piqa"]["metrics"]) == ["acc"]
    assert list(result["tasks"]["diffullama_rocstories"]["metrics"]) == ["rouge1", "rouge2", "rougeL"]


def test_drafter_keeps_the_texts(capsys, model, data_dir):
    arguments = (f"--model={model}", "--objective=autoregressive", "--tasks=gsm8k", f"--data_dir={data_dir}",
                 "--num_fewshot=0", "--json=-")
    plain, drafted = (evaluate(capsys, *arguments, *more) for more in ((), ("--drafter=ngram",)))
    assert plain[0] == drafted[0] == 0, drafted[2]
    one, other = (json.loads(found[1])["tasks"]["gsm8k"] for found in (plain, drafted))
    assert one["metrics"] == other["metrics"]
    costs, fewer = (found["costs"][str(model)] for found in (one, other))
    assert costs["tokens"] == fewer["tokens"] and costs["passes"] >= fewer["passes"]


def test_own_tasks_groups_and_chat_templates(capsys, model, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"q": "The cat", "options": ["sat", "saw"], "gold": 0}\n' * 3)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({
        "task": "mine", "dataset_path": "json", "dataset_kwargs": {"data_files": str(tmp_path / "rows.jsonl")},
        "test_split": "train", "output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": "{{options}}",
        "doc_to_target": "gold", "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True},
                                                 {"metric": "exact_match", "aggregation": "mean",
                                                  "higher_is_better": True}]}))
    (tmp_path / "group.yaml").write_text(yaml.safe_dump({
        "group": "ours", "task": ["mine"], "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}]}))
    arguments = (f"--model={model}", f"--include_path={tmp_path}", "--num_masks=2")
    status, out, err = evaluate(capsys, *arguments, "--tasks=ours", "--json=-")
    assert status == 0, err
    result = json.loads(out)
    assert result["groups"]["ours"][str(model)]["acc"]["mean"] == result["tasks"]["mine"]["metrics"]["acc"]["models"][
        str(model)]["mean"]
    status, _, err = evaluate(capsys, *arguments, "--tasks=mine", "--apply_chat_template")
    assert status == 1 and "chat template" in err and err.count("\n") == 1


def test_code_execution(capsys, model, data_dir, monkeypatch):
    arguments = (f"--model={model}", "--tasks=humaneval_fim_single_line", f"--data_dir={data_dir}",
                 "--num_steps=2", "--json=-", "--allow_code_execution", f"--parent={model}")
    monkeypatch.setattr("shutil.which", lambda name: None)
    status, _, err = evaluate(capsys, *arguments)
    assert status == 1 and "bubblewrap" in err and err.count("\n") == 1
    monkeypatch.undo()
    try:
        Sandbox()
    except Exception as error:
        pytest.skip(f"this machine cannot isolate programs: {error}")
    status, out, err = evaluate(capsys, *arguments)
    assert status == 0, err
    metrics = json.loads(out)["tasks"]["humaneval_fim_single_line"]["metrics"]
    assert list(metrics) == ["pass@1"] and len(metrics["pass@1"]["models"]) == 2


@pytest.mark.parametrize(("arguments", "named"), [
    (("--tasks=hellaswak",), "hellaswag"),
    (("--tasks=piqa,diffullama_piqa",), "diffullama"),
    (("--tasks=diffullama_piqa", "--mc_estimator=time"), "--mc_estimator"),
    (("--tasks=diffullama_gsm8k", "--num_steps=4"), "--num_steps"),
    (("--tasks=diffullama_piqa", "--num_fewshot=1"), "--num_fewshot"),
    (("--tasks=gsm8k", "--policy=surest"), "surest"),
    (("--tasks=gsm8k", "--policy=autoregressive"), "--objective=autoregressive"),
    (("--tasks=gsm8k", "--objective=autoregressive", "--block_length=8"), "--block_length"),
    (("--tasks=piqa", "--block_length=8"), "--block_length"),
    (("--tasks=reconstruction", "--num_steps=8"), "--num_steps"),
    (("--tasks=gsm8k", "--num_fewshot=0", "--drafter=ngram"), "--objective=autoregressive"),
    (("--tasks=piqa", "--objective=autoregressive", "--drafter=ngram"), "--drafter"),
    (("--tasks=piqa", "--judge=MODEL"), "--judge"),
    (("--data", "x.jsonl", "--policy=random"), "--policy"),
    (("--tasks=humaneval_fim_single_line",), "--allow_code_execution"),
    (("--data", "x.jsonl", "--allow_code_execution"), "--tasks"),
    (("--tasks=lambada_openai",), "lambada"),
    (("--tasks=piqa", "--data_files", "piqa=none.jsonl"), "none.jsonl"),
    (("--tasks=piqa", "--data_files", "gsm8k=x.jsonl"), "gsm8k"),
    (("--tasks=piqa", "--data_files", "piqa"), "TASK=FILE"),
    (("--tasks=piqa,piqa",), "piqa,piqa"),
    (("--tasks=piqa", "--limit=0"), "--limit"),
    (("--tasks=piqa", "--length=8"), "--length"),
    (("--data", "x.jsonl", "--limit=8"), "--data_dir"),
    (("--tasks=piqa", "--data", "x.jsonl"), "--examples"),
    (("--tasks=piqa", "--out=results.txt"), "results.txt"),
    (("--tasks=piqa", "--include_path=nowhere"), "nowhere"),
    (("--tasks=gsm8k",), "--num_fewshot"),
    (("--tasks=piqa", "--num_fewshot=2"), "piqa"),
])
def test_refusals(capsys, model, data_dir, tmp_path, monkeypatch, arguments, named):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.jsonl").write_text('{"goal": "g", "sol1": "a", "sol2": "b", "label": 0}\n')
    where = () if arguments[0] == "--data" and "--limit=8" not in arguments else (f"--data_dir={data_dir}",)
    arguments = [argument.replace("MODEL", str(model)) for argument in arguments]
    status, _, err = evaluate(capsys, f"--model={model}", *where, *arguments)
    assert status == 1 and named in err and err.count("\n") == 1


def test_missing_lm_eval(capsys, monkeypatch, model, data_dir):
    for name in [name for name in sys.modules if name.startswith("dlm_jax.evaluation.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    status, _, err = evaluate(capsys, f"--model={model}", "--tasks=piqa", f"--data_dir={data_dir}")
    assert status == 1 and "dlm-jax[evaluation]" in err and err.count("\n") == 1


@pytest.mark.parametrize(("argument", "new"), [
    ("--harness=piqa", "--tasks"), ("--lm_eval=piqa", "--tasks"), ("--lm_eval_dir=tasks", "--include_path"),
    ("--shots=1", "--num_fewshot"), ("--num_samples=3", "--num_masks"), ("--estimator=counts", "--mc_estimator"),
    ("--mc_estimator=counts", "mask_count"), ("--mc_estimator=times", "time")])
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
