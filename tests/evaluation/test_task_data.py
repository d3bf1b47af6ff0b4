"""Local files of tasks: where they are, how they are read, and rows in the fields of lm-eval's tasks."""

import csv
import gzip
import json

import pytest

from dlm_jax.errors import DataError
from dlm_jax.evaluation.task_data import find_file, is_cleaned, load_rows

HELLASWAG = {"activity_label": "Cooking", "ctx_a": "A man stirs.", "ctx_b": "he", "label": "1",
             "endings": ["sleeps.", "eats.", "runs.", "sits."]}
WINOGRANDE = {"sentence": "Ann beat Eve so _ was glad.", "option1": "Ann", "option2": "Eve", "answer": "1"}


def rows_of(tmp_path, task, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_rows(task, str(path))


def test_csv(tmp_path):
    path = tmp_path / "val.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["InputStoryid", *(f"InputSentence{n}" for n in range(1, 5)), "RandomFifthSentenceQuiz1",
                         "RandomFifthSentenceQuiz2", "AnswerRightEnding"])
        writer.writerow(["x", "One.", " Two, it is.", "Three.", "Four.", "No.", "Five.", "2"])
    row, = load_rows("rocstories", str(path))
    assert row["InputSentence2"] == "Two, it is." and row["AnswerRightEnding"] == "2"
    path.write_text(path.read_text() + "y,One.\n")
    with pytest.raises(DataError, match="val.csv, line 3"):
        load_rows("rocstories", str(path))


def test_labels_in_a_file_of_their_own(tmp_path):
    rows = [{"goal": f"g{n}", "sol1": "a", "sol2": "b"} for n in range(2)]
    (tmp_path / "rows-labels.lst").write_text("1\n0\n")
    assert [row["label"] for row in rows_of(tmp_path, "piqa", *rows)] == [1, 0]
    (tmp_path / "rows-labels.lst").write_text("1\n")
    with pytest.raises(DataError, match="rows-labels.lst"):
        rows_of(tmp_path, "piqa", *rows)


def test_other_spellings_of_rows(tmp_path):
    plain, = rows_of(tmp_path, "triviaqa", {"question": "Who?", "answer": {"value": "Al", "aliases": ["Al", "Bo"]}})
    derived, = rows_of(tmp_path, "triviaqa", {"context": "Question: Who?\nAnswer:", "answer": "Al", "aliases": ["Bo"]})
    assert plain == derived == {"question": "Who", "answer": {"value": "Al", "aliases": ["Al", "Bo"]}}
    file = {"data": [{"paragraphs": [{"context": "Rome fell.", "qas": [
        {"question": "What?", "answers": [{"text": "Rome", "answer_start": 0}]},
        {"question": "How?", "answers": [{"text": "fell"}]}]}]}]}
    assert [row["answers"]["text"] for row in rows_of(tmp_path, "squad_completion", file)] == [["Rome"], ["fell"]]
    assert rows_of(tmp_path, "gsm8k_icot", {"text": "1+1?||<<1+1=2>> #### 2"}) == [
        {"question": "1+1?", "answer": "<<1+1=2>> #### 2"}]
    original = rows_of(tmp_path, "hellaswag", HELLASWAG)
    cleaned = rows_of(tmp_path, "diffullama_hellaswag", {"query": "Cooking: A  man", "choices": ["a", "b"], "gold": 1})
    assert not is_cleaned("hellaswag", original) and is_cleaned("diffullama_hellaswag", cleaned)
    assert cleaned == [{"query": "Cooking: A  man", "choices": ["a", "b"], "gold": 1, "label": "1"}]
    opening, = rows_of(tmp_path, "generation", {"text": "A cat sat. A dog ran."})
    assert opening == {"prompt": "A cat sat."} and rows_of(tmp_path, "generation", {"prompt": ""}) == [{"prompt": ""}]


@pytest.mark.parametrize(("task", "row", "mentions"), [
    ("hellaswag", {**HELLASWAG, "label": "4"}, "'label'"),
    ("hellaswag", {"query": "a: b", "choices": "one", "gold": 0}, "'choices'"),
    ("winogrande", {**WINOGRANDE, "answer": ""}, "'answer'"),
    ("winogrande", {**WINOGRANDE, "sentence": "none"}, "_ in the sentence"),
    ("piqa", {"goal": "x"}, "'label'"),
    ("social_iqa", {"label": "0"}, "'label'"),
    ("squad_completion", {"data": [{}]}, "SQuAD"),
    ("lambada_openai", {"words": "word"}, "'text'"),
    ("gsm8k", {"question": "x", "answer": "y"}, "####"),
    ("gsm8k_icot", {"text": "1+1?"}, "||"),
    ("triviaqa", {"question": "x", "answer": "y"}, "'answer'"),
    ("generation", {"prompt": 3}, "'prompt'"),
])
def test_malformed_rows(tmp_path, task, row, mentions):
    with pytest.raises(DataError) as error:
        rows_of(tmp_path, task, row)
    assert mentions in str(error.value) and "rows.jsonl, line 1" in str(error.value) and task in str(error.value)


def test_bad_files(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "a b"}\n{"text": \n')
    with pytest.raises(DataError, match="bad.jsonl, line 2"):
        load_rows("lambada_openai", str(path))
    with pytest.raises(DataError, match="none.jsonl"):
        load_rows("lambada_openai", str(tmp_path / "none.jsonl"))
    path.write_text("\n")
    with pytest.raises(DataError, match="bad.jsonl"):
        load_rows("lambada_openai", str(path))


def test_find_file(tmp_path):
    for name in ("piqa/train.jsonl", "piqa/valid.jsonl", "piqa/test.jsonl", "siqa.jsonl", "gsm8k/a.jsonl",
                 "gsm8k/b.jsonl", "own_task/rows.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    folder = str(tmp_path)
    for task, file in (("piqa", "piqa/valid.jsonl"), ("diffullama_piqa", "piqa/valid.jsonl"),
                       ("social_iqa", "siqa.jsonl"), ("own_task", "own_task/rows.csv")):
        assert find_file(task, folder).endswith(file)
    assert find_file("piqa", folder, ("train",)).endswith("piqa/train.jsonl")
    for task, splits in (("gsm8k", None), ("lambada_openai", None), ("gsm8k_cot", ("train",))):
        with pytest.raises(DataError, match=task):
            find_file(task, folder, splits)
    with pytest.raises(DataError, match="none"):
        find_file("piqa", str(tmp_path / "none"))


def test_compressed_and_other_files(tmp_path):
    rows = b'{"text": "a b"}\n{"text": "c d"}\n'
    for name in ("lambada.jsonl.gz", "more.JSON.GZ"):
        (tmp_path / name).write_bytes(gzip.compress(rows))
        assert [row["text"] for row in load_rows("lambada_openai", str(tmp_path / name))] == ["a b", "c d"]
    assert find_file("lambada_openai", str(tmp_path)).endswith("lambada.jsonl.gz")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(rows)[:-12])
    with pytest.raises(DataError, match="cut.jsonl.gz"):
        load_rows("lambada_openai", str(tmp_path / "cut.jsonl.gz"))
    for name in ("rows.csv.gz", "rows.gz", "rows", "rows.tsv"):
        (tmp_path / name).write_bytes(rows)
        with pytest.raises(DataError, match=f"{name}"):
            load_rows("lambada_openai", str(tmp_path / name))


@pytest.mark.parametrize(("task", "count"), [
    ("hellaswag", 1000), ("winogrande", 1267), ("piqa", 1838), ("social_iqa", 1954), ("lambada_openai", 5153),
    ("triviaqa", 3000), ("gsm8k", 1319), ("gsm8k_cot", 1319), ("gsm8k_icot", 1319), ("rocstories", 1871),
    ("humaneval_fim_single_line", 1033), ("humaneval_fim_random_span_light", 164)])
def test_real_files(test_data, task, count):
    assert len(load_rows(task, find_file(task, str(test_data)))) == count
