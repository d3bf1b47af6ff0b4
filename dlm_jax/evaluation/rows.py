"""Rows of a task's file or dataset, each with where it stands, for messages."""

import csv
import hashlib
import json
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from dlm_jax.data.records import BadRecord, BrokenSource, parse_record
from dlm_jax.data.sources import open_sources, read_chunks
from dlm_jax.errors import DataError

SUFFIXES = (".jsonl", ".json", ".parquet", ".arrow", ".csv", ".txt")
_COMPRESSED = (".jsonl", ".json")  # also as .gz


class Row(NamedTuple):
    """`fields` by name (a line of a .txt file is its `text`); `where` is the file and the line or row."""

    fields: dict[str, Any]
    where: str


def kind_of(file: pathlib.Path) -> str | None:
    """Which of SUFFIXES a file has, of .jsonl.gz and .json.gz the first; None: none of them."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes[-1:] == [".gz"]:
        return suffixes[-2] if suffixes[-2:-1] and suffixes[-2] in _COMPRESSED else None
    return suffixes[-1] if suffixes and suffixes[-1] in SUFFIXES else None


def is_named(path: str) -> bool:
    """Whether it is not a file but a dataset by name, `hf:NAME?name=&split=` or `tfds:NAME?split=`."""
    return path.startswith(("hf:", "tfds:"))


def digest(path: str) -> str:
    """What changes when the rows do: of a file's content, or of what a named dataset says of itself."""
    if is_named(path):
        source, = open_sources([path])
        return hashlib.sha256(json.dumps(source.identity).encode()).hexdigest()[:16]
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def read_rows(path: str) -> list[Row]:
    """All rows of a file: .jsonl, .json (also .gz), .parquet, .arrow, .csv, or .txt with a record a line; or of a
    dataset by name.

    Blank lines are skipped.

    The labels that some tasks keep in a file beside it (valid.jsonl, valid-labels.lst) become the field `label`.

    Raises:
      DataError: there is no such file, it cannot be read, or a row is malformed.
    """
    if is_named(path):
        return list(_record_rows(path))
    file = pathlib.Path(path)
    if not file.is_file():
        raise DataError(f"there is no file {path}")
    if kind_of(file) is None:
        raise DataError(f"{path} is of no kind that a task may have: {', '.join(SUFFIXES)}, .jsonl.gz, .json.gz")
    reader = {".csv": _csv_rows, ".txt": _text_rows}.get(kind_of(file), _record_rows)
    try:
        rows = list(reader(file))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    labels = file.with_name(f"{file.stem}-labels.lst")
    if not labels.is_file() or any("label" in row.fields for row in rows):
        return rows
    values = labels.read_text().split()
    if len(values) != len(rows):
        raise DataError(f"{labels} has {len(values)} labels for the {len(rows)} rows of {file.name}")
    return [Row({**row.fields, "label": value}, row.where) for row, value in zip(rows, values, strict=True)]


def _record_rows(path: str | pathlib.Path) -> Iterator[Row]:
    source, = open_sources([str(path)])
    try:
        for chunk in read_chunks(source):
            for number, raw in enumerate(chunk.records, chunk.first):
                where = chunk.location(number)
                try:
                    record = parse_record(raw)
                except BadRecord as error:
                    raise DataError(f"{where}: {error}") from error
                if record == "":
                    continue
                yield Row({"text": record} if isinstance(record, str) else record, where)
    except BrokenSource as error:
        raise DataError(str(error)) from error


def _csv_rows(file: pathlib.Path) -> Iterator[Row]:
    with file.open(newline="", encoding="utf-8-sig") as stream:
        reader = csv.DictReader(stream, strict=True)
        try:
            for fields in reader:
                where = f"{file}, line {reader.line_num}"
                if None in fields or None in fields.values():
                    raise DataError(f"{where}: not as many values as the {len(reader.fieldnames)} columns of its head")
                yield Row(fields, where)
        except csv.Error as error:
            raise DataError(f"{file}, line {reader.line_num}: not CSV ({error})") from error


def _text_rows(file: pathlib.Path) -> Iterator[Row]:
    with file.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                yield Row({"text": line.rstrip("\n")}, f"{file}, line {number}")
