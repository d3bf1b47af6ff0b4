"""Datasets by name, read as they would be after their download: from files."""

import json
import os
import sys

import pyarrow as pa
import pyarrow.parquet
import pytest

from dlm_jax.data.records import BadRecord, BrokenSource, get_text
from dlm_jax.data.sources import open_sources, read_chunks
from dlm_jax.data.sources import parse_spec
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


def test_records_are_plain_python_from_any_start_on(spec):
    (source,) = open_sources([spec, spec])
    for start in (0, 1, 255, 256, 599, 600, 700):
        assert list(source.records(start)) == RECORDS[start:], start
        some = [{"text": record["text"], "turns": record["turns"]} for record in RECORDS]
        assert list(source.records(start, ["text", "turns"])) == some[start:], start
    assert source.name == spec
    assert source.size in (COUNT, None)
    assert "tensorflow" not in sys.modules


def test_chunks_of_named_datasets_count_examples(spec):
    (source,) = open_sources([spec])
    number = 300
    for chunk in read_chunks(source, 299, ["number"], max_bytes=500):
        assert (chunk.source, chunk.unit, chunk.first) == (spec, "example", number)
        number += len(chunk.records)
        assert source.consumed() == number - 1 == chunk.records[-1]["number"] + 1
    assert source.consumed() == COUNT


def test_another_split(spec):
    (source,) = open_sources([spec.replace("?split=train", "?split=test").replace("?data", "?split=test&data")])
    assert list(source.records()) == RECORDS[:3]


@pytest.mark.parametrize(("more", "message"), [
    ("&split=nope", "nope.*train.*test"), ("&splt=train", "'splt' is not an option .* split, data_dir"),
    ("&split=", "'split' is not an option with a value")])
def test_a_wrong_option_is_named_beside_the_right_ones(spec, more, message):
    with pytest.raises(DataError, match=message):
        open_sources([spec + more])


def test_options_are_taken_as_they_stand():
    assert parse_spec("tfds:a/b:1.*.*?split=train[:10%]+test&data_dir=gs://x/y=z", ("split", "data_dir")) == (
        "a/b:1.*.*", {"split": "train[:10%]+test", "data_dir": "gs://x/y=z"})


def test_a_slice_of_a_split_and_the_version_in_the_identity(tfds_folder):
    whole, part = open_sources([f"tfds:toy?data_dir={tfds_folder}{more}" for more in ("", "&split=train[:50%]+test")])
    assert list(part.records()) == RECORDS[:300] + RECORDS[:3]
    assert whole.identity() != part.identity()
    assert "1.2.0" in json.dumps(whole.identity())
    with pytest.raises(DataError, match="no column 'body' .it has .*turns"):
        list(whole.records(columns=["body"]))


def test_what_tfds_has_not_prepared_is_refused_with_the_command_that_does(tfds_folder, tmp_path):
    for name in ("toy/large", "toy/small:3.0.0", "unknown", "no name"):
        with pytest.raises(DataError, match="is not prepared in .*tfds build .* --file_format=array_record --data_dir"):
            open_sources([f"tfds:{name}?data_dir={tfds_folder}"])
    with pytest.raises(DataError, match="names no dataset; write tfds:NAME"):
        open_sources(["tfds:?split=train"])
    before = tfds_folder / "toy/small/1.2.0"
    after = tmp_path / "toy/small/1.2.0"
    after.mkdir(parents=True)
    for file in before.iterdir():  # as `tfds build` leaves it without a file format
        content = file.read_bytes()
        (after / file.name).write_bytes(
            content.replace(b'"array_record"', b'"tfrecord"') if file.name == "dataset_info.json" else content)
    with pytest.raises(DataError, match="needs TensorFlow .tfrecord.; prepare it anew: tfds build toy/small"):
        open_sources([f"tfds:toy/small?data_dir={tmp_path}"])


def test_hugging_face_folders(tmp_path):
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"text": "a"}\n{"text": null}\n{"text": "c"}')
    (source,) = open_sources([f"hf:{tmp_path}"])
    a, nothing, c = source.records()
    assert (a, c) == ({"text": "a"}, {"text": "c"})
    with pytest.raises(BadRecord, match="NoneType under 'text'"):
        get_text(nothing, "text")
    with pytest.raises(DataError, match="no column 'body'"):
        list(source.records(columns=["body"]))
    os.utime(lines, (0, 0))
    assert open_sources([f"hf:{tmp_path}"])[0].identity() != source.identity()
    with pytest.raises(DataError, match="none cannot be opened"):
        open_sources([f"hf:{tmp_path}/none"])


def test_a_damaged_file_of_a_hugging_face_dataset_says_how_far_it_was_read(tmp_path):
    for part in range(2):
        pyarrow.parquet.write_table(pa.Table.from_pylist(RECORDS[:300]), tmp_path / f"train-{part}.parquet")
    (source,) = open_sources([f"hf:{tmp_path}"])
    (tmp_path / "train-1.parquet").write_bytes(b"no parquet")
    with pytest.raises(BrokenSource, match="damaged after example 256 "):
        list(source.records())


def test_the_extra_of_hugging_face_datasets_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'dlm-jax\[datasets\]'"):
        open_sources(["hf:name"])
