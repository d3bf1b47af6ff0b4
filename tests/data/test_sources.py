import gzip
import json

import pytest

from dlm_jax.data.sources import documents, expand
from dlm_jax.errors import DataError


def test_globs_are_expanded_sorted_and_each_file_named_once(tmp_path):
    for name in ("b.txt", "a.txt", "deep/c.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = expand([f"{tmp_path}/**/*.jsonl", f"{tmp_path}/*.txt", f"{tmp_path}/a.txt"])
    assert found == [tmp_path / "a.txt", tmp_path / "b.txt", tmp_path / "deep/c.jsonl"]


@pytest.mark.parametrize(
    ("pattern", "message"), [("none*.txt", "no file matches"), ("", "is a folder"), ("x.csv", "not a kind")]
)
def test_what_cannot_be_read_is_refused(tmp_path, pattern, message):
    (tmp_path / "x.csv").touch()
    with pytest.raises(DataError, match=message):
        expand([f"{tmp_path}/{pattern}"])


def test_every_kind_of_file_gives_the_same_documents(tmp_path):
    texts = ["one\ntwo", "é\u2028 three", "four"]
    records = [{"text": text} for text in texts]
    lines = "\n".join(map(json.dumps, records)) + "\n\n"
    files = {
        "a.txt": "\n\n\n".join(texts),
        "b.jsonl": lines,
        "c.json": lines,
        "d.json": "\n " + json.dumps(records, ensure_ascii=False),
        "e.json": json.dumps(texts),
        "f.jsonl": "\ufeff" + "\n".join(map(json.dumps, texts)),
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content.encode()))
    for path in expand([f"{tmp_path}/*"]):
        assert list(documents([path], separator="\n\n\n")) == texts, path


def test_a_text_file_is_one_document_without_a_separator(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    assert list(documents([tmp_path / "a.txt"])) == ["one\n\ntwo"]


def test_a_separator_may_straddle_the_chunks_a_file_is_read_in(tmp_path, monkeypatch):
    monkeypatch.setattr("dlm_jax.data.sources._CHUNK", 3)
    (tmp_path / "a.txt").write_text("one<|end|>two<|end|> \n <|end|>three<|end|>")
    assert list(documents([tmp_path / "a.txt"], separator="<|end|>")) == ["one", "two", "three"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n\n{"text": \n', "a.jsonl, line 3: not JSON"),
        (b'{"content": "a", "id": 1}', "line 1: no key 'text' .it has content, id.; set data.text_key"),
        (b'{"text": 3}', "line 1: int where text"),
        (b'"\\ud800"', "line 1: not valid Unicode"),
        (b'"\xff"', "a.jsonl: not UTF-8"),
    ],
)
def test_a_bad_line_is_named(tmp_path, content, message):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(documents([tmp_path / "a.jsonl"]))


def test_a_bad_item_of_a_list_is_named(tmp_path):
    (tmp_path / "a.json").write_text('["a", ["b"]]')
    with pytest.raises(DataError, match="item 2: list where text"):
        list(documents([tmp_path / "a.json"]))


@pytest.mark.parametrize("content", [gzip.compress(b'{"text": "a"}\n' * 999)[:-12], b"no gzip"])
def test_a_damaged_archive_is_named(tmp_path, content):
    (tmp_path / "a.jsonl.gz").write_bytes(content)
    with pytest.raises(DataError, match=r"a.jsonl.gz: cannot be read"):
        list(documents([tmp_path / "a.jsonl.gz"]))


def test_another_text_key(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "a"}')
    assert list(documents([tmp_path / "a.jsonl"], text_key="body")) == ["a"]
