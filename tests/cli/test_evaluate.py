"""`dlm evaluate --tasks`: a table of two models from local files, resumed, and what is refused."""

import json
import pathlib

import pytest

from dlm_jax import DiffusionLM
from dlm_jax.cli.main import main
from tests.cli.conftest import RECIPE

TASK_ROWS = {
    "piqa/valid.jsonl": [{"goal": f"The {animal} sat", "sol1": "on the mat", "sol2": "and saw Tom", "label": n % 2}
                         for n, animal in enumerate(("cat", "dog", "bird", "cat", "dog"))],
    "gsm8k/test.jsonl": [{"question": "The sun?", "answer": "#### 2"}, {"question": "Tom?", "answer": "#### 3"}],
    "gsm8k/train.jsonl": [{"question": "1?", "answer": "#### 1"}],
    "rocstories.jsonl": [{**{f"InputSentence{n}": "Tom." for n in range(1, 5)}, "RandomFifthSentenceQuiz1": "a",
                          "RandomFifthSentenceQuiz2": "b", "AnswerRightEnding": 1}],
    "text.jsonl": [{"text": "The cat sat on the mat and saw Tom, who was happy that the sun was warm."}],
}


@pytest.fixture(scope="module")
def parent(base, tmp_path_factory):
    """The tiny base with random weights, as an autoregressive model."""
    folder = tmp_path_factory.mktemp("evaluated")
    recipe = folder / "recipe.py"
    recipe.write_text(RECIPE + "    return config\n")
    text = folder / "text.jsonl"
    text.write_text('{"text": "The cat sat on the mat and saw Tom, who was happy."}\n' * 30)
    assert main(["train", f"--config={recipe}", f"--workdir={folder / 'run'}", "--config.num_steps=1",
                 f"--config.model.source={base}", f"--config.data.train={text}",
                 "--config.data.validation_fraction=0"]) == 0
    DiffusionLM.from_pretrained(folder / "run").save_pretrained(folder / "parent")
    return folder / "parent"


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


def test_a_table_of_a_model_beside_its_parent(capsys, parent, data_dir, tmp_path):
    out = tmp_path / "results.json"
    arguments = (f"--model={parent}", "--tasks=piqa,gsm8k,text", f"--data_dir={data_dir}", f"--parent={parent}",
                 "--num_samples=3", "--num_steps=2", "--batch_size=4")
    status, table, err = evaluate(capsys, *arguments, f"--out={out}")
    assert status == 0, err
    assert "accuracy normalised" in table and "marked number" in table and "bits per byte" in table
    result = json.loads(out.read_text())
    assert result["tasks"]["piqa"]["items"] == 5 and len(result["records"]) == 2 * (5 + 2 + 1)
    assert result["settings"]["num_samples"] == 3 and result["versions"]["jax"]
    assert set(result["tasks"]["text"]["differences"]) == {"bits_per_byte"}
    assert "| piqa | accuracy |" in out.with_suffix(".md").read_text()
    lines = [json.loads(line) for line in (tmp_path / "results.items.jsonl").read_text().splitlines()]
    assert lines == result["records"]
    status, _, err = evaluate(capsys, *arguments, f"--out={out}")
    assert status == 1 and "is there already" in err

    # Stopped after six items and begun again, it ends the same.
    again = tmp_path / "again.json"
    partial = tmp_path / "again.items.jsonl.partial"
    partial.write_text("".join(json.dumps(line) + "\n" for line in lines[:6]) + '{"broken')
    partial.with_name(partial.name + ".json").write_text(json.dumps(result["settings"]))
    status, _, err = evaluate(capsys, *arguments, f"--out={again}")
    assert status == 0, err
    assert json.loads(again.read_text())["tasks"] == result["tasks"]


def test_the_protocol_of_the_release_and_infilling(capsys, parent, data_dir):
    status, out, err = evaluate(capsys, f"--model={parent}", "--tasks=piqa,rocstories", f"--data_dir={data_dir}",
                                "--protocol=release", "--json=-", "--limit=2")
    assert status == 0, err
    result = json.loads(out)
    assert result["settings"]["num_samples"] == 32 and result["tasks"]["piqa"]["items"] == 2
    assert list(result["tasks"]["piqa"]["models"][str(parent)]) == ["accuracy"]
    assert list(result["tasks"]["rocstories"]["models"][str(parent)]) == ["rouge1", "rouge2", "rougeL"]


@pytest.mark.parametrize(("arguments", "message"), [
    (("--tasks=pika",), "there is no task 'pika'"),
    (("--tasks=lambada",), "no file of the task lambada"),
    (("--tasks=piqa", "--data_files", "piqa=none.jsonl"), "there is no file none.jsonl"),
    (("--tasks=piqa", "--data_files", "gsm8k=x.jsonl"), "gsm8k is not among --tasks=piqa"),
    (("--tasks=piqa", "--data_files", "piqa"), "write TASK=FILE"),
    (("--tasks=piqa,piqa",), "names a task twice"),
    (("--tasks=piqa", "--limit=0"), "--limit must be at least 1"),
    (("--tasks=piqa", "--length=8"), "--length belongs to --data"),
    (("--data", "x.jsonl", "--limit=8"), "--data_dir belongs to --tasks"),
    (("--tasks=piqa", "--data", "x.jsonl"), "one of the three"),
    (("--tasks=piqa", "--out=results.txt"), "must end in .json"),
    (("--tasks=gsm8k", "--shots=2"), "--shots=2, and"),
    (("--tasks=piqa", "--shots=1"), "no file of the task piqa"),
    (("--tasks=piqa", "--shots=1", "--protocol=release"), "no examples"),
])
def test_what_cannot_be_done_is_one_sentence(capsys, parent, data_dir, arguments, message):
    status, _, err = evaluate(capsys, f"--model={parent}", f"--data_dir={data_dir}", *arguments)
    assert status == 1 and message in err and err.count("\n") == 1


def test_a_model_without_a_mask_token_is_refused(capsys, data_dir):
    shipped = pathlib.Path(__file__).parents[2] / "assets" / "stories-gpt2"
    arguments = (f"--model={shipped}", "--tasks=piqa", f"--data_dir={data_dir}")
    status, _, err = evaluate(capsys, *arguments)
    assert status == 1 and "records no mask token" in err and err.count("\n") == 1
    status, _, err = evaluate(capsys, *arguments, "--objective=autoregressive", "--limit=1")
    assert status == 0, err
