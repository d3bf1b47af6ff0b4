"""Tasks by name: lm-eval's with local data, own YAML files, examples, and what is refused."""

import json

import pytest
import yaml

from dlm_jax.errors import ConfigError, DataError
from dlm_jax.evaluation.task_loading import OWN_TASKS, load_tasks

pytestmark = pytest.mark.usefixtures("offline")
PIQA = [{"goal": f"g{n}", "sol1": "a", "sol2": "b", "label": n % 2} for n in range(4)]


@pytest.fixture
def folder(tmp_path):
    for name, rows in {"piqa/valid.jsonl": PIQA[:3], "piqa/train.jsonl": PIQA[2:],
                       "gsm8k/test.jsonl": [{"question": "1?", "answer": "#### 1"}]}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_local_data_of_lm_evals_task(folder):
    found = load_tasks(["piqa"], data_dir=str(folder), num_fewshot=2)
    task = found.tasks["piqa"]
    assert len(task.eval_docs) == 3 and task.get_config("num_fewshot") == 2
    context = task.fewshot_context(task.eval_docs[0], 2)
    assert context.endswith("Question: g0\nAnswer:") and "Question: g3\nAnswer: b\n\n" in context
    assert [about["task"] for about in found.files] == ["piqa", "piqa (examples)"]
    assert found.files[0]["file"].endswith("valid.jsonl") and len(found.files[0]["sha256"]) == 16
    named = load_tasks(["piqa"], data_files={"piqa": str(folder / "piqa/train.jsonl")})
    assert len(named.tasks["piqa"].eval_docs) == 2


def test_every_own_task_says_what_it_is():
    for path in OWN_TASKS.glob("[!_]*.yaml"):
        text = path.read_text()
        assert f"task: {path.stem}\n" in text and "version:" in text


def test_own_yaml_files(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"q": "x", "options": ["a", "b"], "gold": 0}\n')
    config = {"task": "mine", "dataset_path": "json", "dataset_kwargs": {"data_files": str(tmp_path / "rows.jsonl")},
              "test_split": "train", "output_type": "multiple_choice", "doc_to_text": "{{q}}",
              "doc_to_choice": "{{options}}", "doc_to_target": "gold", "metric_list": [{"metric": "acc"}]}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config))
    found = load_tasks(["mine"], include_path=str(tmp_path), data_dir=str(tmp_path))  # its own data, not the folder's
    assert list(found.tasks) == ["mine"] and found.files == []


@pytest.mark.parametrize(("settings", "error", "mentions"), [
    ({"names": ["hellaswak"]}, ConfigError, "hellaswag"),
    ({"names": ["siqa"]}, ConfigError, "social_iqa"),
    ({"names": ["piqa"], "data_files": {"gsm8k": "x.jsonl"}}, ConfigError, "gsm8k"),
    ({"names": ["piqa"], "num_fewshot": 3}, ConfigError, "piqa"),
    ({"names": ["gsm8k"]}, ConfigError, "num_fewshot"),  # five examples, and no training file
    ({"names": ["lambada_openai"]}, DataError, "lambada_openai"),
    ({"names": ["arc_easy"], "data_dir": None}, DataError, "arc_easy"),  # from the hub, without a network
])
def test_refusals(folder, settings, error, mentions, request):
    if settings.get("data_dir", "") is None:
        request.getfixturevalue("no_hub")
    settings = {"data_dir": str(folder), **settings}
    with pytest.raises(error) as found:
        load_tasks(settings.pop("names"), **settings)
    assert mentions in str(found.value) and "\n" not in str(found.value)


@pytest.fixture
def no_hub(monkeypatch):
    import datasets

    def refuse(*arguments, **settings):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", refuse)


def test_code_needs_permission(folder):
    (folder / "humaneval.jsonl").write_text(json.dumps({
        "task_id": "HumanEval/0", "prompt": "def f():\n", "canonical_solution": "    return 1\n", "entry_point": "f",
        "test": "def check(f):\n    assert f() == 1\n"}) + "\n")
    with pytest.raises(ConfigError, match="--allow_code_execution"):
        load_tasks(["humaneval"], data_dir=str(folder))
