"""Files of tasks: where they are, how they are read, and the errors of bad ones."""

import csv
import gzip
import json

import pytest

from dlm_jax.errors import ConfigError, DataError
from dlm_jax.evaluation.tasks import TASKS, find_file, find_task, hub_spec, load_items


def items_of(tmp_path, name, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_items(find_task(name), str(path))


def test_rocstories_csv(tmp_path):
    path = tmp_path / "val.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["InputStoryid", *(f"InputSentence{n}" for n in range(1, 5)), "RandomFifthSentenceQuiz1",
                         "RandomFifthSentenceQuiz2", "AnswerRightEnding"])
        writer.writerow(["x", "One.", "Two, it is.", "Three.", "Four.", "No.", "Five.", "2"])
    item, = load_items(TASKS["rocstories"], str(path))
    assert (item.prompt, item.answers, item.suffix) == ("One. Two, it is. ", ("Three.",), " Four. Five.")
    path.write_text(path.read_text() + "y,One.\n")
    with pytest.raises(DataError, match="val.csv, line 3"):
        load_items(TASKS["rocstories"], str(path))


def test_labels_in_a_file_of_their_own(tmp_path):
    rows = [{"goal": f"g{n}", "sol1": "a", "sol2": "b"} for n in range(2)]
    (tmp_path / "rows-labels.lst").write_text("1\n0\n")
    assert [item.gold for item in items_of(tmp_path, "piqa", *rows)] == [1, 0]
    (tmp_path / "rows-labels.lst").write_text("1\n")
    with pytest.raises(DataError, match="rows-labels.lst"):
        items_of(tmp_path, "piqa", *rows)


def test_bad_files(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "a b"}\n{"text": \n')
    with pytest.raises(DataError, match="bad.jsonl, line 2"):
        load_items(TASKS["lambada"], str(path))
    with pytest.raises(DataError, match="none.jsonl"):
        load_items(TASKS["lambada"], str(tmp_path / "none.jsonl"))
    path.write_text("\n")
    with pytest.raises(DataError, match="bad.jsonl"):
        load_items(TASKS["lambada"], str(path))
    with pytest.raises(ConfigError, match="helaswag.*hellaswag"):
        find_task("helaswag")


def test_find_file(tmp_path):
    for name in ("piqa/train.jsonl", "piqa/valid.jsonl", "piqa/test.jsonl", "siqa.jsonl", "gsm8k/a.jsonl",
                 "gsm8k/b.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert find_file(TASKS["piqa"], str(tmp_path)).endswith("piqa/valid.jsonl")
    assert find_file(TASKS["piqa"], str(tmp_path), ("train",)).endswith("piqa/train.jsonl")
    assert find_file(TASKS["siqa"], str(tmp_path)).endswith("siqa.jsonl")
    with pytest.raises(DataError, match="gsm8k"):
        find_file(TASKS["gsm8k"], str(tmp_path))
    with pytest.raises(DataError, match="lambada"):
        find_file(TASKS["lambada"], str(tmp_path))
    with pytest.raises(DataError, match="gsm8k.*train"):
        find_file(TASKS["gsm8k"], str(tmp_path), ("train",))
    with pytest.raises(DataError, match="none"):
        find_file(TASKS["piqa"], str(tmp_path / "none"))


def test_compressed_and_other_files(tmp_path):
    rows = b'{"text": "a b"}\n{"text": "c d"}\n'
    for name in ("lambada.jsonl.gz", "more.JSON.GZ"):
        (tmp_path / name).write_bytes(gzip.compress(rows))
        assert [item.answers for item in load_items(TASKS["lambada"], str(tmp_path / name))] == [("b",), ("d",)]
    assert find_file(TASKS["lambada"], str(tmp_path)).endswith("lambada.jsonl.gz")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(rows)[:-12])
    with pytest.raises(DataError, match="cut.jsonl.gz"):
        load_items(TASKS["lambada"], str(tmp_path / "cut.jsonl.gz"))
    for name in ("rows.csv.gz", "rows.gz", "rows", "rows.tsv"):
        (tmp_path / name).write_bytes(rows)
        with pytest.raises(DataError, match=f"{name}"):
            load_items(TASKS["lambada"], str(tmp_path / name))


def test_find_humaneval_infilling(tmp_path):
    (tmp_path / "humaneval_infilling").mkdir()
    for name in ("SingleLine", "MultiLine", "RandomSpan", "RandomSpanInfillingLight"):
        (tmp_path / "humaneval_infilling" / f"HumanEval-{name}Infilling.jsonl.gz").touch()
    assert find_file(TASKS["humaneval_infilling"], str(tmp_path)).endswith("HumanEval-SingleLineInfilling.jsonl.gz")
    (tmp_path / "humaneval_infilling" / "HumanEval-SingleLineInfilling.jsonl.gz").unlink()
    with pytest.raises(DataError, match="humaneval_infilling"):
        find_file(TASKS["humaneval_infilling"], str(tmp_path))


@pytest.mark.parametrize(("name", "count"), [
    ("hellaswag", 1000), ("winogrande", 1267), ("piqa", 1838), ("siqa", 1954), ("lambada", 5153), ("triviaqa", 3000),
    ("gsm8k", 1319), ("gsm8k_cot", 1319), ("gsm8k_icot", 1319), ("rocstories", 1871), ("humaneval_infilling", 1033)])
def test_real_files(test_data, name, count):
    task = TASKS[name]
    found = load_items(task, find_file(task, str(test_data)))
    assert len(found) == count
    assert all(item.options or item.answers or item.tests for item in found)
    if task.kind == "choice":
        assert len({item.gold for item in found}) == len(found[0].options)


def test_hub_spec():
    assert hub_spec(TASKS["piqa"]) == "hf:baber/piqa?split=validation"
    assert hub_spec(TASKS["gsm8k"]) == "hf:openai/gsm8k?name=main&split=test"
    assert hub_spec(TASKS["gsm8k_cot"], "train") == "hf:openai/gsm8k?name=main&split=train"
    assert hub_spec(TASKS["rocstories"]) is None
