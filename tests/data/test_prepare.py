import dataclasses
import gzip
import json

import numpy as np
import pytest

from dlm_jax.data import prepare as preparing
from dlm_jax.data.config import ExampleConfig, RowsConfig
from dlm_jax.data.manifest import MANIFEST_FILE, read_manifest
from dlm_jax.data.prepare import prepare
from dlm_jax.data.records import is_held_out
from dlm_jax.data.sources import open_sources
from dlm_jax.errors import DataError

CONFIG = RowsConfig(length=16, validation_fraction=0.2)


@pytest.fixture
def corpus(tmp_path):
    """Three files of documents of many lengths, one of them compressed."""
    random = np.random.default_rng(0)
    folder = tmp_path / "text"
    folder.mkdir()
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl"):
        lines = [json.dumps({"text": f"{name} {i} " + "word " * int(random.integers(0, 30))}) for i in range(300)]
        with (gzip.open if name.endswith("gz") else open)(folder / name, "wt") as file:
            file.write("\n".join(lines) + "\n")
    return folder


def sources_of(corpus):
    return open_sources([f"{corpus}/*.jsonl*"])


def contents(directory) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def rows_of(directory, part="train"):
    rows = read_manifest(str(directory)).rows(str(directory), part)
    return rows[np.arange(len(rows))]


def small_chunks(monkeypatch, max_bytes: int = 2000):
    read_chunks = preparing.read_chunks
    monkeypatch.setattr(preparing, "read_chunks", lambda *given: read_chunks(*given, max_bytes=max_bytes))


@pytest.mark.parametrize("packing", ["concat", "document_mask"])
def test_rows_are_the_documents_of_each_part_end_to_end(tmp_path, corpus, tokenizer, packing):
    config = dataclasses.replace(CONFIG, packing=packing)
    manifest = prepare(sources_of(corpus), str(tmp_path / "rows"), tokenizer, config)
    documents = [json.loads(line)["text"] for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl")
                 for line in (gzip.open if name.endswith("gz") else open)(corpus / name, "rt")]
    streams = {part: tokenizer.decode(rows_of(tmp_path / "rows", part).tokens.ravel()) for part in manifest.splits}
    bos = "<s>" if packing == "document_mask" else ""
    expected = {"train": "", "validation": ""}
    for document in documents:
        expected["validation" if is_held_out(document, 0.2) else "train"] += f"{bos}{document}</s>"
    for part, stream in streams.items():
        assert expected[part].startswith(stream)
        assert len(tokenizer.encode(expected[part][len(stream):])) < 16
        assert manifest.splits[part].tokens == len(tokenizer.encode(expected[part]))
    assert sum(part.documents for part in manifest.splits.values()) == 900
    assert 0.1 < manifest.splits["validation"].documents / 900 < 0.3
    assert (rows_of(tmp_path / "rows").starts is not None) == (packing == "document_mask")


def test_neither_workers_nor_chunks_nor_files_change_the_rows(tmp_path, corpus, tokenizer, monkeypatch):
    prepare(sources_of(corpus), str(tmp_path / "one"), tokenizer, CONFIG)
    small_chunks(monkeypatch)
    prepare(sources_of(corpus), str(tmp_path / "two"), tokenizer, CONFIG, workers=2)
    prepare(sources_of(corpus), str(tmp_path / "many"), tokenizer, CONFIG, shard_bytes=1000)
    one, many = contents(tmp_path / "one"), contents(tmp_path / "many")
    assert one == contents(tmp_path / "two")
    assert len(many) > 20 > len(one)
    for part in ("train", "validation"):
        np.testing.assert_array_equal(rows_of(tmp_path / "one", part).tokens, rows_of(tmp_path / "many", part).tokens)


@pytest.mark.parametrize("after", [1, 7, 25])
def test_an_interrupted_run_goes_on_to_the_same_files(tmp_path, corpus, tokenizer, monkeypatch, after):
    small_chunks(monkeypatch)
    whole, directory = tmp_path / "whole", tmp_path / "interrupted"
    prepare(sources_of(corpus), str(whole), tokenizer, CONFIG, shard_bytes=1000)
    add, added = preparing.Progress.add, []

    def interrupted(self, encoded, reached):
        if len(added) == after:
            raise KeyboardInterrupt
        added.append(reached)
        add(self, encoded, reached)

    monkeypatch.setattr(preparing.Progress, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(sources_of(corpus), str(directory), tokenizer, CONFIG, shard_bytes=1000)
    assert not (directory / MANIFEST_FILE).exists()
    again = []
    monkeypatch.setattr(preparing.Progress, "add",
                        lambda self, encoded, reached: again.append(reached) or add(self, encoded, reached))
    prepare(sources_of(corpus), str(directory), tokenizer, CONFIG, shard_bytes=1000)
    assert contents(directory) == contents(whole)
    if after > 1:  # by then a file was written, and what it holds is not read again
        assert again[0] != added[0]


def test_a_finished_directory_is_left_alone_and_another_corpus_refused(tmp_path, corpus, tokenizer, bos_tokenizer):
    first = prepare(sources_of(corpus), str(tmp_path / "rows"), tokenizer, CONFIG)
    before = contents(tmp_path / "rows")
    assert prepare(sources_of(corpus), str(tmp_path / "rows"), tokenizer, CONFIG) == first
    for other in ({"config": dataclasses.replace(CONFIG, length=8)}, {"tokenizer": bos_tokenizer}):
        given = {"tokenizer": tokenizer, "config": CONFIG} | other
        with pytest.raises(DataError, match="rows of other sources, settings or another tokenizer"):
            prepare(sources_of(corpus), str(tmp_path / "rows"), given["tokenizer"], given["config"])
    assert contents(tmp_path / "rows") == before


def test_bad_records_stop_or_are_reported_counted_and_left_out(tmp_path, tokenizer, caplog):
    lines = [json.dumps({"text": f"document {i}"}) for i in range(50)]
    lines[7], lines[20], lines[33] = "{broken", json.dumps({"body": "x"}), json.dumps({"text": None})
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"bad.jsonl, line 8: not JSON .*data.on_bad_record to skip"):
        prepare(open_sources([str(path)]), str(tmp_path / "rows"), tokenizer, CONFIG)
    skip = dataclasses.replace(CONFIG, on_bad_record="skip")  # what was begun goes on with the other policy
    manifest = prepare(open_sources([str(path)]), str(tmp_path / "rows"), tokenizer, skip)
    assert manifest.counts["bad_records"] == 3
    assert [where.split(":")[0].rpartition("/")[2] for where in manifest.bad_records] == [
        "bad.jsonl, line 8", "bad.jsonl, line 21", "bad.jsonl, line 34"]
    assert sum(part.documents for part in manifest.splits.values()) == 47
    assert "line 21: no key 'text' (it has body)" in caplog.text


def test_a_broken_file_stops_or_its_rest_is_left_out(tmp_path, corpus, tokenizer):
    path = corpus / "b.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(DataError, match=r"b\.jsonl\.gz"):
        prepare(sources_of(corpus), str(tmp_path / "stopped"), tokenizer, CONFIG)
    manifest = prepare(sources_of(corpus), str(tmp_path / "rows"), tokenizer,
                       dataclasses.replace(CONFIG, on_bad_record="skip"))
    assert manifest.counts["bad_records"] == 1
    assert "b.jsonl.gz" in manifest.bad_records[0]
    assert 600 <= sum(part.documents for part in manifest.splits.values()) < 900


def test_nothing_in_the_sources_is_an_error(tmp_path, tokenizer):
    (tmp_path / "blank.jsonl").write_text('{"text": " "}\n\n')
    with pytest.raises(DataError, match=r"there is no text in .*blank.jsonl"):
        prepare(open_sources([str(tmp_path / "blank.jsonl")]), str(tmp_path / "rows"), tokenizer, CONFIG)
    (tmp_path / "wrong.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(DataError, match=r"no record of .* \(1 are bad\); the first: .*no key 'text'"):
        prepare(open_sources([str(tmp_path / "wrong.jsonl")]), str(tmp_path / "rows2"), tokenizer,
                dataclasses.replace(CONFIG, on_bad_record="skip"))


def test_a_damaged_progress_file_is_named(tmp_path, corpus, tokenizer):
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "progress.npz").write_bytes(b"nonsense")
    with pytest.raises(DataError, match=r"progress.npz is damaged"):
        prepare(sources_of(corpus), str(tmp_path / "rows"), tokenizer, CONFIG)


def test_examples_go_the_same_road(tmp_path, tokenizer):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i}+{i}=", "response": str(2 * i)}) + "\n" for i in range(40)))
    config = RowsConfig(length=16, validation_fraction=0.0,
                        examples=ExampleConfig("prompt_response", train_on_padding=False))
    manifest = prepare(open_sources([str(path)]), str(tmp_path / "rows"), tokenizer, config, workers=1)
    rows = rows_of(tmp_path / "rows")
    assert len(rows) == manifest.counts["examples"] == 40
    learnt = [tokenizer.decode(row[where]) for row, where in zip(rows.tokens, rows.noisable_mask, strict=True)]
    assert learnt == [f"{2 * i}</s>" for i in range(40)]


def test_an_object_store_takes_the_rows(corpus, tokenizer):
    import fsspec

    manifest = prepare(sources_of(corpus), "memory://bucket/rows", tokenizer, CONFIG, shard_bytes=1000)
    files = fsspec.filesystem("memory")
    assert {name.rpartition("/")[2] for name in files.ls("/bucket/rows", detail=False)} == {
        MANIFEST_FILE, *(shard.file for part in manifest.splits.values() for shard in part.shards)}
    assert read_manifest("memory://bucket/rows") == manifest
