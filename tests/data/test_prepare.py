import dataclasses
import gzip
import json
import os
import time

import fsspec
import numpy as np
import pytest

from dlm_jax.data import prepare as prepare_module
from dlm_jax.data.config import ExampleConfig, RowsConfig
from dlm_jax.data.manifest import MANIFEST_FILE, read_manifest
from dlm_jax.data.prepare import ordered_map, prepare
from dlm_jax.data.records import is_held_out
from dlm_jax.data.sources import open_sources
from dlm_jax.errors import DataError

CONFIG = RowsConfig(length=16, validation_fraction=0.2)
FILES = ("a.jsonl", "b.jsonl.gz", "c.jsonl")


def open_text(path, mode: str = "rt"):
    return (gzip.open if path.suffix == ".gz" else open)(path, mode)


@pytest.fixture
def corpus(tmp_path):
    """Three files of documents of many lengths, one of them compressed."""
    random = np.random.default_rng(0)
    folder = tmp_path / "text"
    folder.mkdir()
    for name in FILES:
        lines = [json.dumps({"text": f"{name} {i} " + "word " * int(random.integers(0, 30))}) for i in range(300)]
        with open_text(folder / name, "wt") as file:
            file.write("\n".join(lines) + "\n")
    return folder


def corpus_sources(corpus):
    return open_sources([f"{corpus}/*.jsonl*"])


def contents(directory) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def read_rows(directory, split="train"):
    return read_manifest(str(directory)).rows(split)[slice(None)]


@pytest.fixture
def small_chunks(monkeypatch):
    read_chunks = prepare_module.read_chunks
    monkeypatch.setattr(prepare_module, "read_chunks", lambda *given: read_chunks(*given, max_bytes=2000))


@pytest.mark.parametrize("packing", ["concat", "document_mask"])
def test_rows_are_the_documents_of_each_split(tmp_path, corpus, tokenizer, packing):
    config = dataclasses.replace(CONFIG, packing=packing)
    manifest = prepare(corpus_sources(corpus), str(tmp_path / "rows"), tokenizer, config)
    documents = [json.loads(line)["text"] for name in FILES for line in open_text(corpus / name)]
    bos = "<s>" if packing == "document_mask" else ""
    expected = {"train": "", "validation": ""}
    for document in documents:
        expected["validation" if is_held_out(document, 0.2) else "train"] += f"{bos}{document}</s>"
    for split, found in manifest.splits.items():
        stream = tokenizer.decode(read_rows(tmp_path / "rows", split).tokens.ravel())
        assert expected[split].startswith(stream)
        assert len(tokenizer.encode(expected[split][len(stream):])) < 16
        assert found.tokens == len(tokenizer.encode(expected[split]))
    assert sum(split.documents for split in manifest.splits.values()) == 900
    assert 0.1 < manifest.splits["validation"].documents / 900 < 0.3
    assert (read_rows(tmp_path / "rows").starts is not None) == (packing == "document_mask")


def test_rows_do_not_depend_on_workers_chunks_or_shards(tmp_path, corpus, tokenizer, request):
    prepare(corpus_sources(corpus), str(tmp_path / "one"), tokenizer, CONFIG)
    request.getfixturevalue("small_chunks")
    prepare(corpus_sources(corpus), str(tmp_path / "workers"), tokenizer, CONFIG, workers=2)
    prepare(corpus_sources(corpus), str(tmp_path / "shards"), tokenizer, CONFIG, shard_bytes=1000)
    one, shards = contents(tmp_path / "one"), contents(tmp_path / "shards")
    assert one == contents(tmp_path / "workers")
    assert len(shards) > 20 > len(one)
    for split in ("train", "validation"):
        np.testing.assert_array_equal(read_rows(tmp_path / "one", split).tokens,
                                      read_rows(tmp_path / "shards", split).tokens)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("after", [1, 7, 25])
def test_interrupted_preparation_resumes_to_identical_files(tmp_path, corpus, tokenizer, monkeypatch, after):
    complete, directory = tmp_path / "complete", tmp_path / "interrupted"
    prepare(corpus_sources(corpus), str(complete), tokenizer, CONFIG, shard_bytes=1000)
    add, added = prepare_module.Progress.add, []

    def interrupt(self, encoded, cursor):
        if len(added) == after:
            raise KeyboardInterrupt
        added.append(cursor)
        add(self, encoded, cursor)

    monkeypatch.setattr(prepare_module.Progress, "add", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare(corpus_sources(corpus), str(directory), tokenizer, CONFIG, shard_bytes=1000)
    assert not (directory / MANIFEST_FILE).exists()
    resumed = []
    monkeypatch.setattr(prepare_module.Progress, "add",
                        lambda self, encoded, cursor: resumed.append(cursor) or add(self, encoded, cursor))
    prepare(corpus_sources(corpus), str(directory), tokenizer, CONFIG, shard_bytes=1000)
    assert contents(directory) == contents(complete)
    if after > 1:  # by then a shard was written, and its records are not read again
        assert resumed[0] != added[0]


def test_complete_directory_is_kept_and_other_rows_refused(tmp_path, corpus, tokenizer, bos_tokenizer):
    rows = tmp_path / "rows"
    first = prepare(corpus_sources(corpus), str(rows), tokenizer, CONFIG)
    before = contents(rows)
    assert prepare(corpus_sources(corpus), str(rows), tokenizer, CONFIG) == first
    for other_tokenizer, other_config in ((tokenizer, dataclasses.replace(CONFIG, length=8)), (bos_tokenizer, CONFIG)):
        with pytest.raises(DataError, match=str(rows)):
            prepare(corpus_sources(corpus), str(rows), other_tokenizer, other_config)
    assert contents(rows) == before


def test_bad_records_raise_or_are_skipped_and_counted(tmp_path, tokenizer, caplog):
    lines = [json.dumps({"text": f"document {i}"}) for i in range(50)]
    lines[7], lines[20], lines[33] = "{broken", json.dumps({"body": "x"}), json.dumps({"text": None})
    path, rows = tmp_path / "bad.jsonl", str(tmp_path / "rows")
    path.write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"bad\.jsonl, line 8: .*data\.on_bad_record"):
        prepare(open_sources([str(path)]), rows, tokenizer, CONFIG)
    skip = dataclasses.replace(CONFIG, on_bad_record="skip")  # resumes in the same directory
    manifest = prepare(open_sources([str(path)]), rows, tokenizer, skip)
    assert manifest.counts["bad_records"] == 3
    assert [where.split(":")[0].rpartition("/")[2] for where in manifest.bad_records] == [
        "bad.jsonl, line 8", "bad.jsonl, line 21", "bad.jsonl, line 34"]
    assert sum(split.documents for split in manifest.splits.values()) == 47
    assert "line 21" in caplog.text


def test_broken_file_raises_or_its_rest_is_skipped(tmp_path, corpus, tokenizer):
    path = corpus / "b.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(DataError, match=r"b\.jsonl\.gz"):
        prepare(corpus_sources(corpus), str(tmp_path / "stopped"), tokenizer, CONFIG)
    skip = dataclasses.replace(CONFIG, on_bad_record="skip")
    manifest = prepare(corpus_sources(corpus), str(tmp_path / "rows"), tokenizer, skip)
    assert manifest.counts["bad_records"] == 1 and "b.jsonl.gz" in manifest.bad_records[0]
    assert 600 <= sum(split.documents for split in manifest.splits.values()) < 900


@pytest.mark.parametrize("line", ['{"text": " "}\n\n', '{"body": "x"}\n'])
def test_sources_without_text_are_refused(tmp_path, tokenizer, line):
    (tmp_path / "empty.jsonl").write_text(line)
    with pytest.raises(DataError, match=r"empty\.jsonl"):
        prepare(open_sources([str(tmp_path / "empty.jsonl")]), str(tmp_path / "rows"), tokenizer,
                dataclasses.replace(CONFIG, on_bad_record="skip"))


def test_damaged_progress_file_is_named(tmp_path, corpus, tokenizer):
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "progress.npz").write_bytes(b"nonsense")
    with pytest.raises(DataError, match=r"progress\.npz"):
        prepare(corpus_sources(corpus), str(tmp_path / "rows"), tokenizer, CONFIG)


def test_examples_are_prepared_by_workers(tmp_path, tokenizer):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i}+{i}=", "response": str(2 * i)}) + "\n" for i in range(40)))
    config = RowsConfig(length=16, validation_fraction=0.0,
                        examples=ExampleConfig("prompt_response", train_on_padding=False))
    manifest = prepare(open_sources([str(path)]), str(tmp_path / "rows"), tokenizer, config, workers=1)
    rows = read_rows(tmp_path / "rows")
    assert len(rows) == manifest.counts["examples"] == 40
    learned = [tokenizer.decode(row[mask]) for row, mask in zip(rows.tokens, rows.noisable_mask, strict=True)]
    assert learned == [f"{2 * i}</s>" for i in range(40)]


def test_rows_on_an_object_store(corpus, tokenizer):
    manifest = prepare(corpus_sources(corpus), "memory://bucket/rows", tokenizer, CONFIG, shard_bytes=1000)
    names = {name.rpartition("/")[2] for name in fsspec.filesystem("memory").ls("/bucket/rows", detail=False)}
    assert names == {MANIFEST_FILE, *(shard.file for split in manifest.splits.values() for shard in split.shards)}
    assert read_manifest("memory://bucket/rows") == manifest


def square(x: int) -> tuple[int, int]:
    time.sleep(0.02 * (x % 3 == 0))  # some results are ready before earlier ones
    return x * x, os.getpid()


def refuse_five(x: int) -> int:
    if x == 5:
        raise DataError("five is refused")
    return x


def die(x: int) -> int:
    os._exit(1)


def test_ordered_map_in_processes():
    with ordered_map(square, 2) as run:
        results = list(run((-x, x) for x in range(30)))
    assert [(tag, value) for tag, (value, _) in results] == [(-x, x * x) for x in range(30)]
    assert os.getpid() not in {process for _, (_, process) in results}


def test_ordered_map_is_lazy():
    with ordered_map(square, 0) as run:
        assert next(run((x, x) for x in range(3))) == (0, (0, os.getpid()))
    taken = []
    with ordered_map(abs, 2) as run:
        next(run((taken.append(x), x) for x in range(1000)))
        assert len(taken) < 20


@pytest.mark.parametrize("workers", [0, 1])
def test_ordered_map_raises_errors_in_order(workers):
    found = []
    with pytest.raises(DataError, match="five is refused"), ordered_map(refuse_five, workers) as run:
        found.extend(x for _, x in run((None, x) for x in range(9)))
    assert found == [0, 1, 2, 3, 4]


def test_dead_worker_is_a_data_error():
    with pytest.raises(DataError, match="workers"), ordered_map(die, 1) as run:
        list(run((None, x) for x in range(3)))
