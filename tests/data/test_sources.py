"""Datasets by name, read from files as after their download."""

import json
import os
import sys

import pyarrow as pa
import pyarrow.parquet
import pytest

from dlm_jax.data.records import BadRecord, BrokenSource, get_text
from dlm_jax.data.sources import open_sources, parse_spec, read_chunks
from dlm_jax.errors import DataError
from tests.named_datasets import RECORDS

COUNT = len(RECORDS)


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf")
    pyarrow.parquet.write_table(pa.Table.from_pylist(RECORDS), folder / "train.parquet", row_group_size=100)
    pyarrow.parquet.write_table(pa.Table.from_pylist(RECORDS[:3]), folder / "test.parquet")
    return folder


@pytest.fixture(params=["tfds", "hf"])
def spec(request):
    """Where the records are, ready for more options."""
    folder = request.getfixturevalue(f"{request.param}_folder")
    return f"tfds:toy/small:1.2.0?data_dir={folder}" if request.param == "tfds" else f"hf:{folder}?split=train"


def test_records_from_any_start(spec):
    (source,) = open_sources([spec, spec])
    some = [{"text": record["text"], "turns": record["turns"]} for record in RECORDS]
    for start in (0, 1, 255, 256, 599, 600, 700):
        assert list(source.records(start)) == RECORDS[start:], start
        assert list(source.records(start, ["text", "turns"])) == some[start:], start
    with pytest.raises(DataError, match=r"body.*turns"):
        list(source.records(columns=["body"]))
    assert source.name == spec
    assert source.size in (COUNT, None)
    assert "tensorflow" not in sys.modules


def test_chunks_count_examples(spec):
    (source,) = open_sources([spec])
    number = 300
    for chunk in read_chunks(source, 299, ["number"], max_bytes=500):
        assert (chunk.source, chunk.unit, chunk.first) == (spec, "example", number)
        number += len(chunk.records)
        assert source.consumed == number - 1 == chunk.records[-1]["number"] + 1
    assert source.consumed == COUNT


def test_other_splits(spec, tfds_folder):
    (source,) = open_sources([spec.replace("?split=train", "?split=test").replace("?data", "?split=test&data")])
    assert list(source.records()) == RECORDS[:3]
    full, mixed = open_sources([f"tfds:toy?data_dir={tfds_folder}{more}" for more in ("", "&split=train[:50%]+test")])
    assert list(mixed.records()) == RECORDS[:300] + RECORDS[:3]
    assert full.identity != mixed.identity
    assert "1.2.0" in json.dumps(full.identity)


@pytest.mark.parametrize(("more", "message"), [
    ("&split=nope", "nope.*train.*test"), ("&splt=train", "splt.* split, data_dir|splt.*split"), ("&split=", "split")])
def test_wrong_options_are_named_with_the_right_ones(spec, more, message):
    with pytest.raises(DataError, match=message):
        open_sources([spec + more])


def test_options_are_not_unescaped():
    assert parse_spec("tfds:a/b:1.*.*?split=train[:10%]+test&data_dir=gs://x/y=z", ("split", "data_dir")) == (
        "a/b:1.*.*", {"split": "train[:10%]+test", "data_dir": "gs://x/y=z"})


def test_unprepared_tfds_datasets_are_refused_with_the_command(tfds_folder, tmp_path):
    for name in ("toy/large", "toy/small:3.0.0", "unknown", "no name"):
        with pytest.raises(DataError, match=r"tfds build .* --file_format=array_record --data_dir"):
            open_sources([f"tfds:{name}?data_dir={tfds_folder}"])
    with pytest.raises(DataError, match="tfds:NAME"):
        open_sources(["tfds:?split=train"])
    prepared, copy = tfds_folder / "toy/small/1.2.0", tmp_path / "toy/small/1.2.0"
    copy.mkdir(parents=True)
    for file in prepared.iterdir():  # as `tfds build` writes it without a file format
        content = file.read_bytes()
        (copy / file.name).write_bytes(
            content.replace(b'"array_record"', b'"tfrecord"') if file.name == "dataset_info.json" else content)
    with pytest.raises(DataError, match="tfrecord.*tfds build toy/small"):
        open_sources([f"tfds:toy/small?data_dir={tmp_path}"])


def test_hugging_face_folder(tmp_path):
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"text": "a"}\n{"text": null}\n{"text": "c"}')
    (source,) = open_sources([f"hf:{tmp_path}"])
    first, null, last = source.records()
    assert (first, last) == ({"text": "a"}, {"text": "c"})
    with pytest.raises(BadRecord):
        get_text(null, "text")
    with pytest.raises(DataError, match="body"):
        list(source.records(columns=["body"]))
    os.utime(lines, (0, 0))
    assert open_sources([f"hf:{tmp_path}"])[0].identity != source.identity
    with pytest.raises(DataError, match="none"):
        open_sources([f"hf:{tmp_path}/none"])


def test_damaged_hugging_face_dataset_says_how_far_it_was_read(tmp_path):
    for number in range(2):
        pyarrow.parquet.write_table(pa.Table.from_pylist(RECORDS[:300]), tmp_path / f"train-{number}.parquet")
    (source,) = open_sources([f"hf:{tmp_path}"])
    (tmp_path / "train-1.parquet").write_bytes(b"no parquet")
    with pytest.raises(BrokenSource, match="example 256 "):
        list(source.records())


def test_missing_datasets_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"dlm-jax\[datasets\]"):
        open_sources(["hf:name"])
