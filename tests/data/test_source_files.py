import dataclasses
import gzip
import json
import random
import subprocess
import sys

import fsspec
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
import pytest
import zstandard
from fsspec.registry import _registry

from dlm_jax.data.records import BrokenSource, parse_record
from dlm_jax.data.sources import open_sources, read_chunks
from dlm_jax.errors import DataError

SEPARATOR = "\n<|end|>\n"


def documents(count: int) -> list[str]:
    rng = random.Random(0)
    return ["".join(rng.choices("ab \n\u2028é🙂\"", k=rng.randrange(1, 60))) + "." for _ in range(count)]


def contents(texts: list[str]) -> dict[str, bytes]:
    """The same documents as a file of each kind."""
    records = [{"id": number, "text": text} for number, text in enumerate(texts)]
    lines = "\n".join(map(json.dumps, records)) + "\n"
    table = pa.Table.from_pylist(records)
    binary = {"rows.parquet": pa.BufferOutputStream(), "file.arrow": pa.BufferOutputStream(),
              "stream.arrow": pa.BufferOutputStream()}
    pyarrow.parquet.write_table(table, binary["rows.parquet"], row_group_size=7)
    for name, create in {"file.arrow": pa.ipc.new_file, "stream.arrow": pa.ipc.new_stream}.items():
        with create(binary[name], table.schema) as writer:
            writer.write_table(table, max_chunksize=5)
    text = {"a.txt": SEPARATOR.join(texts), "b.jsonl": lines, "c.json": lines, "e.json": json.dumps(texts),
            "d.json": "\ufeff \n" + json.dumps(records, indent=1, ensure_ascii=False),
            "f.jsonl": "\ufeff" + "\n".join(map(json.dumps, texts))}
    files = {name: content.encode() for name, content in text.items()}
    files |= {f"{name}.gz": gzip.compress(content) for name, content in files.items()}
    files |= {f"{name}.zst": b"".join(zstandard.compress(content[at:at + 300]) for at in range(0, len(content), 300))
              for name, content in files.items() if not name.endswith(".gz")}  # in many frames, as pzstd writes
    return files | {name: sink.getvalue().to_pybytes() for name, sink in binary.items()}


KINDS = sorted(contents(["a"]))


@pytest.fixture(params=["disk", "memory"])
def folder(request, tmp_path):
    if request.param == "disk":
        return str(tmp_path)
    fsspec.filesystem("memory").store.clear()
    return "memory://corpus"


def put(path: str, content: bytes):
    with fsspec.open(path, "wb") as file:
        file.write(content)


def texts_of(payloads) -> list[str]:
    records = map(parse_record, payloads)
    return [record if isinstance(record, str) else record["text"] for record in records]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_the_same_documents_from_any_start_on(folder, kind):
    texts = documents(40)
    put(f"{folder}/{kind}", contents(texts)[kind])
    (source,) = open_sources([f"{folder}/*"], separator=SEPARATOR)
    assert source.name == f"{folder}/{kind}"
    assert source.consumed() == 0
    for start in (0, 1, 5, 6, 7, 20, 39, 40, 50):
        assert texts_of(source.records(start)) == texts[start:], start
        assert texts_of(source.records(start, ["text"])) == texts[start:], start
        assert source.consumed() == source.size


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("max_bytes", [1, 100, 1 << 20])
def test_chunks_hold_all_records_under_their_numbers(tmp_path, kind, max_bytes, monkeypatch):
    monkeypatch.setattr("dlm_jax.data.sources._CHUNK_RECORDS", 9)
    texts = documents(30)
    put(f"{tmp_path}/{kind}", contents(texts)[kind])
    (source,) = open_sources([f"{tmp_path}/{kind}"], separator=SEPARATOR)
    behind, number = 0, 4
    for chunk in read_chunks(source, 3, ["text"], max_bytes):
        assert (chunk.source, chunk.unit, chunk.first) == (source.name, source.unit, number)
        assert texts_of(chunk.records) == texts[number - 1:number - 1 + len(chunk.records)]
        assert len(chunk.records) <= (1 if max_bytes == 1 else 9)
        assert behind <= source.consumed() <= source.size
        behind, number = source.consumed(), number + len(chunk.records)
    assert number == 31
    assert source.consumed() == source.size


def test_only_needed_columns_of_tables_are_read(tmp_path):
    for kind in ("rows.parquet", "file.arrow", "stream.arrow"):
        put(f"{tmp_path}/{kind}", contents(["a"])[kind])
    for source in open_sources([f"{tmp_path}/*"]):
        assert list(source.records(columns=["text", "absent"])) == [{"text": "a"}]
        assert list(source.records()) == [{"id": 0, "text": "a"}]
        with pytest.raises(DataError, match=r"no column 'body' \(it has id, text\); set data.text_key"):
            list(source.records(columns=["body"]))


def test_sources_come_in_the_order_of_specs_those_of_a_glob_sorted_each_once(folder):
    for name in ("b.txt", "a.txt", "deep/down/c.jsonl", "deep/c.jsonl"):
        put(f"{folder}/{name}", b"") if "://" in folder else fsspec.open(f"{folder}/{name}", "wb").open().close()
    found = open_sources([f"{folder}/**/*.jsonl", f"{folder}/b.txt", f"{folder}/*.txt"])
    names = ["deep/c.jsonl", "deep/down/c.jsonl", "b.txt", "a.txt"]
    assert [source.name for source in found] == [f"{folder}/{name}" for name in names]


def test_two_paths_to_one_file_are_one_source_and_home_is_known(tmp_path, monkeypatch):
    (tmp_path / "a[1].txt").write_text("a")
    (tmp_path / "link.txt").symlink_to(tmp_path / "a[1].txt")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(open_sources([f"{tmp_path}/a[1].txt", "~/a[1].txt", f"{tmp_path}/link.txt"])) == 1


def test_the_identity_follows_the_content(folder):
    path = f"{folder}/a.txt"
    put(path, b"one")
    before = open_sources([path])[0].identity()
    assert json.loads(json.dumps(before)) == before == open_sources([path])[0].identity()
    put(path, b"two")
    assert open_sources([path])[0].identity() != before


@pytest.mark.parametrize(
    ("spec", "message"),
    [("none*.txt", "no file matches"), ("deep", "it is a folder, name the files in it"),
     ("x.csv", "not a kind of file"), ("x.parquet.gz", "not a kind of file")])
def test_what_is_not_there_or_not_read_is_refused(folder, spec, message):
    for name in ("x.csv", "x.parquet.gz", "deep/a.txt"):
        put(f"{folder}/{name}", b"x")
    with pytest.raises(DataError, match=message):
        open_sources([f"{folder}/{spec}"])


def test_a_store_that_cannot_be_reached_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    monkeypatch.delitem(_registry, "gs", raising=False)
    with pytest.raises(DataError, match=r"pip install 'dlm-jax\[gcs\]'"):
        open_sources(["gs://bucket/a.jsonl"])


@pytest.mark.parametrize("kind", ["b.jsonl.gz", "b.jsonl.zst", "a.txt.gz", "rows.parquet", "stream.arrow",
                                  "file.arrow"])
def test_a_damaged_file_gives_what_comes_before_and_says_how_far(folder, kind, monkeypatch):
    monkeypatch.setattr("dlm_jax.data.source_files._TABLE_ROWS", 7)
    texts = documents(400)
    content = contents(texts)[kind]
    third = len(content) // 3
    put(f"{folder}/{kind}", content[:third] + bytes(400) + content[third + 400:] if kind == "rows.parquet"
        else content[:-9])
    (source,) = open_sources([f"{folder}/{kind}"], separator=SEPARATOR)
    found = []
    with pytest.raises(BrokenSource) as caught:
        found.extend(payload for chunk in read_chunks(source, 0, ["text"], 100) for payload in chunk.records)
    assert str(caught.value).startswith(f"{folder}/{kind}: damaged after {source.unit} {len(found)} (")
    assert texts_of(found) == texts[:len(found)]
    assert found or kind == "file.arrow"  # its index is at its end


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.jsonl.zst", "x.json.gz", "x.json", "x.parquet", "x.arrow"])
def test_a_file_that_is_not_what_its_name_says_is_broken_from_the_start(tmp_path, name):
    put(f"{tmp_path}/{name}", b"[ no such format")
    with pytest.raises(BrokenSource, match="damaged after (line|item|row) 0"):
        list(open_sources([f"{tmp_path}/{name}"])[0].records())


def test_a_store_that_stops_answering_has_not_damaged_the_file(monkeypatch):
    put("memory://corpus/a.jsonl.gz", gzip.compress(b'"a"\n' * 999))
    (source,) = open_sources(["memory://corpus/a.jsonl.gz"])

    def fail(*_):
        raise RuntimeError("token expired")

    monkeypatch.setattr("fsspec.implementations.memory.MemoryFile.read", fail)
    with pytest.raises(DataError, match="the store stopped answering .token expired.; run the same command") as caught:
        list(source.records())
    assert not isinstance(caught.value, BrokenSource)


def test_heavy_packages_are_imported_only_when_used(tmp_path):
    put(f"{tmp_path}/a.jsonl", b'"a"\n')
    code = ("import sys; from dlm_jax.data.sources import open_sources; "
            f"list(open_sources(['{tmp_path}/a.jsonl'])[0].records()); "
            "print({'pyarrow', 'datasets', 'tensorflow_datasets', 'zstandard'} & set(sys.modules))")
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "set()"


def test_chunks_are_what_workers_can_be_sent(tmp_path):
    put(f"{tmp_path}/a.jsonl", b'\n"a"\n')
    (chunk,) = read_chunks(open_sources([f"{tmp_path}/a.jsonl"])[0])
    assert dataclasses.asdict(chunk)["payloads"] == [b"\n", b'"a"\n']  # a blank line keeps its number
    assert chunk.where(2).endswith("a.jsonl, line 2")
