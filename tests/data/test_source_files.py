import contextlib
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

from dlm_jax.data import source_files
from dlm_jax.data.records import BrokenSource, parse_record
from dlm_jax.data.source_files import split_text
from dlm_jax.data.sources import open_sources, read_chunks
from dlm_jax.errors import DataError

SEPARATOR = "\n<|end|>\n"


def random_documents(count: int) -> list[str]:
    rng = random.Random(0)
    return ["".join(rng.choices("ab \n\u2028é🙂\"", k=rng.randrange(1, 60))) + "." for _ in range(count)]


def files_of_every_kind(texts: list[str]) -> dict[str, bytes]:
    """The same documents as a file of each kind."""
    records = [{"id": number, "text": text} for number, text in enumerate(texts)]
    lines = "\n".join(map(json.dumps, records)) + "\n"
    table = pa.Table.from_pylist(records)
    binary = {name: pa.BufferOutputStream() for name in ("rows.parquet", "file.arrow", "stream.arrow")}
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


KINDS = sorted(files_of_every_kind(["a"]))


@pytest.fixture(params=["disk", "memory"])
def folder(request, tmp_path):
    if request.param == "disk":
        return str(tmp_path)
    fsspec.filesystem("memory").store.clear()
    return "memory://corpus"


def put(path: str, content: bytes):
    with fsspec.open(path, "wb", auto_mkdir=True) as file:
        file.write(content)


def texts_of(raw_records) -> list[str]:
    records = map(parse_record, raw_records)
    return [record if isinstance(record, str) else record["text"] for record in records]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_the_same_documents(folder, kind):
    texts = random_documents(40)
    put(f"{folder}/{kind}", files_of_every_kind(texts)[kind])
    (source,) = open_sources([f"{folder}/*"], separator=SEPARATOR)
    assert source.name == f"{folder}/{kind}"
    assert source.consumed == 0
    for start in (0, 1, 5, 6, 7, 20, 39, 40, 50):
        assert texts_of(source.records(start)) == texts[start:], start
        assert texts_of(source.records(start, ["text"])) == texts[start:], start
        assert source.consumed == source.size


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("max_bytes", [1, 100, 1 << 20])
def test_chunks_number_all_records(tmp_path, kind, max_bytes, monkeypatch):
    monkeypatch.setattr("dlm_jax.data.sources._CHUNK_RECORDS", 9)
    texts = random_documents(30)
    put(f"{tmp_path}/{kind}", files_of_every_kind(texts)[kind])
    (source,) = open_sources([f"{tmp_path}/{kind}"], separator=SEPARATOR)
    before, number = 0, 4
    for chunk in read_chunks(source, 3, ["text"], max_bytes):
        assert (chunk.source, chunk.unit, chunk.first) == (source.name, source.unit, number)
        assert texts_of(chunk.records) == texts[number - 1:number - 1 + len(chunk.records)]
        assert len(chunk.records) <= (1 if max_bytes == 1 else 9)
        assert before <= source.consumed <= source.size
        before, number = source.consumed, number + len(chunk.records)
    assert number == 31
    assert source.consumed == source.size


def test_blank_lines_keep_their_numbers(tmp_path):
    put(f"{tmp_path}/a.jsonl", b'\n"a"\n')
    (chunk,) = read_chunks(open_sources([f"{tmp_path}/a.jsonl"])[0])
    assert dataclasses.asdict(chunk)["records"] == [b"\n", b'"a"\n']
    assert chunk.location(2).endswith("a.jsonl, line 2")


@pytest.mark.parametrize("kind", ["rows.parquet", "file.arrow", "stream.arrow"])
def test_tables_are_read_by_column(tmp_path, kind):
    put(f"{tmp_path}/{kind}", files_of_every_kind(["a"])[kind])
    source, = open_sources([f"{tmp_path}/*"])
    assert list(source.records(columns=["text", "absent"])) == [{"text": "a"}]
    assert list(source.records()) == [{"id": 0, "text": "a"}]
    with pytest.raises(DataError, match=r"body.*id, text.*data\.text_key"):
        list(source.records(columns=["body"]))


def test_sources_are_ordered_by_spec_and_unique(folder):
    for name in ("b.txt", "a.txt", "deep/down/c.jsonl", "deep/c.jsonl"):
        put(f"{folder}/{name}", b"")
    found = open_sources([f"{folder}/**/*.jsonl", f"{folder}/b.txt", f"{folder}/*.txt"])
    names = ["deep/c.jsonl", "deep/down/c.jsonl", "b.txt", "a.txt"]
    assert [source.name for source in found] == [f"{folder}/{name}" for name in names]


def test_paths_to_one_file_are_one_source(tmp_path, monkeypatch):
    (tmp_path / "a[1].txt").write_text("a")
    (tmp_path / "link.txt").symlink_to(tmp_path / "a[1].txt")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(open_sources([f"{tmp_path}/a[1].txt", "~/a[1].txt", f"{tmp_path}/link.txt"])) == 1


def test_identity_follows_the_content(folder):
    path = f"{folder}/a.txt"
    put(path, b"one")
    before = open_sources([path])[0].identity
    assert json.loads(json.dumps(before)) == before == open_sources([path])[0].identity
    put(path, b"two")
    assert open_sources([path])[0].identity != before


@pytest.mark.parametrize("spec", ["none*.txt", "deep", "x.csv", "x.parquet.gz"])
def test_missing_and_unknown_files_are_refused(folder, spec):
    for name in ("x.csv", "x.parquet.gz", "deep/a.txt"):
        put(f"{folder}/{name}", b"x")
    with pytest.raises(DataError, match=spec.replace("*", r"\*")):
        open_sources([f"{folder}/{spec}"])


def test_missing_store_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    monkeypatch.delitem(_registry, "gs", raising=False)
    with pytest.raises(DataError, match=r"dlm-jax\[gcs\]"):
        open_sources(["gs://bucket/a.jsonl"])


@pytest.mark.parametrize("kind", ["b.jsonl.gz", "b.jsonl.zst", "a.txt.gz", "rows.parquet", "stream.arrow",
                                  "file.arrow"])
def test_damaged_file_gives_the_records_before_the_damage(folder, kind, monkeypatch):
    monkeypatch.setattr(source_files, "_TABLE_ROWS", 7)
    texts = random_documents(400)
    content = files_of_every_kind(texts)[kind]
    third = len(content) // 3
    put(f"{folder}/{kind}", content[:third] + bytes(400) + content[third + 400:] if kind == "rows.parquet"
        else content[:-9])
    (source,) = open_sources([f"{folder}/{kind}"], separator=SEPARATOR)
    found = []
    with pytest.raises(BrokenSource) as caught:
        found.extend(record for chunk in read_chunks(source, 0, ["text"], 100) for record in chunk.records)
    message = str(caught.value)
    assert message.startswith(f"{folder}/{kind}: ") and f" {source.unit} {len(found)} (" in message
    assert texts_of(found) == texts[:len(found)]
    assert found or kind == "file.arrow"  # its index is at its end


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.jsonl.zst", "x.json.gz", "x.json", "x.parquet", "x.arrow"])
def test_file_of_another_format_is_broken(tmp_path, name):
    put(f"{tmp_path}/{name}", b"[ no such format")
    with pytest.raises(BrokenSource, match="(line|item|row) 0"):
        list(open_sources([f"{tmp_path}/{name}"])[0].records())


def test_failing_store_is_not_a_damaged_file(monkeypatch):
    put("memory://corpus/a.jsonl.gz", gzip.compress(b'"a"\n' * 999))
    (source,) = open_sources(["memory://corpus/a.jsonl.gz"])

    def fail(*_):
        raise RuntimeError("token expired")

    monkeypatch.setattr("fsspec.implementations.memory.MemoryFile.read", fail)
    with pytest.raises(DataError, match="token expired") as caught:
        list(source.records())
    assert not isinstance(caught.value, BrokenSource)


def test_heavy_packages_are_imported_only_when_used(tmp_path):
    put(f"{tmp_path}/a.jsonl", b'"a"\n')
    code = ("import sys; from dlm_jax.data.sources import open_sources; "
            f"list(open_sources(['{tmp_path}/a.jsonl'])[0].records()); "
            "print({'pyarrow', 'datasets', 'tensorflow_datasets', 'zstandard'} & set(sys.modules))")
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "set()"


@pytest.mark.parametrize("separator", ["a", "ab", "aab", "\n\n\n", "aa"])
@pytest.mark.parametrize("block", [1, 2, 3, 7, 1000])
def test_split_text_equals_str_split(separator, block):
    rng = random.Random(block)
    for _ in range(200):
        text = "".join(rng.choices(["a", "b", "\n", separator], k=rng.randrange(12)))
        expected = text.split(separator)
        blocks = [text[at:at + block] for at in range(0, len(text), block)]
        assert list(split_text(blocks, separator)) == (expected if expected[-1] else expected[:-1])


def test_text_file_without_separator_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\n\r\ntwo".encode())
    (source,) = open_sources([f"{tmp_path}/a.txt"])
    assert list(source.records()) == ["one\n\ntwo"]
    assert list(source.records(1)) == []


def test_invalid_utf8_breaks_a_text_but_only_one_json_line(tmp_path, monkeypatch):
    monkeypatch.setattr(source_files, "BLOCK", 4)
    (tmp_path / "a.txt").write_bytes(b"one|two|" + b"x" * 20_000 + b"|\xff|four")
    (source,) = open_sources([f"{tmp_path}/a.txt"], separator="|")
    with pytest.raises(BrokenSource, match=r"a\.txt.*document 2"):
        list(source.records())
    (tmp_path / "a.jsonl").write_bytes(b'"a"\n"\xff"\n"b"')
    assert list(open_sources([f"{tmp_path}/a.jsonl"])[0].records(1)) == [b'"\xff"\n', b'"b"']


@pytest.mark.parametrize(("content", "unit"), [(b" \n[1]", "item"), (b"\xef\xbb\xbf [", "item"), (b"", "line"),
                                               (b'{"a": []}', "line"), (b" " * 9, "line")])
def test_json_list_is_recognized_by_its_first_character(tmp_path, content, unit):
    (tmp_path / "a.json").write_bytes(content)
    (source,) = open_sources([f"{tmp_path}/a.json"])
    with contextlib.suppress(BrokenSource):
        list(source.records())
    assert source.unit == unit


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_object_over_several_lines_is_one_record(tmp_path, bom):
    file = tmp_path / "one.json"
    file.write_bytes(bom + b'{\n "text": "a",\n "more": [1,\n 2]\n}\n')
    source, = open_sources([str(file)])
    assert list(source.records()) == [{"text": "a", "more": [1, 2]}] and source.unit == "item"
    file.write_bytes(bom + b'{"text": "a"}\n{"text": "b"}\n{bad\n')
    source, = open_sources([str(file)])
    assert len(list(source.records())) == 3 and source.unit == "line"
