"""Text files as a stream of documents."""

import glob
import gzip
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from dlm_jax.errors import DataError

SUFFIXES = (".txt", ".jsonl", ".json")
_CHUNK = 1 << 20


def expand(patterns: Sequence[str]) -> list[Path]:
    """The files that paths and globs (`**` included) name, sorted, each once.

    Raises:
      DataError: a pattern names no file, or a file of a kind that is not read.
    """
    found: set[Path] = set()
    for pattern in patterns:
        matches = [Path(name) for name in glob.glob(os.path.expanduser(pattern), recursive=True)]
        files = [path for path in matches if path.is_file()]
        if not files:
            hint = f"; it is a folder, try {pattern.rstrip('/')}/*.jsonl" if matches else ""
            raise DataError(f"no file matches {pattern!r}{hint}")
        found.update(files)
    for path in found:
        if _kind(path) not in SUFFIXES:
            raise DataError(f"{path}: not a kind of file this reads ({', '.join(SUFFIXES)}, each also .gz)")
    return sorted(found)


def documents(paths: Sequence[Path], *, text_key: str = "text", separator: str = "") -> Iterator[str]:
    """Yields the documents of the files in order, blank ones left out.

    A .txt file is parted at `separator` (empty: it is one document). A .jsonl file holds one JSON value a
    line, a .json file a list of values, or lines too; a value is a string or a record with its text under
    `text_key`.

    Raises:
      DataError: a file that cannot be read, with its name and, for JSON, the line or item.
    """
    for path in paths:
        try:
            with _open(path) as file:
                plain = _kind(path) == ".txt"
                texts = _split(file, separator) if plain else _json_texts(file, path, text_key)
                yield from (text for text in texts if text.strip())
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8 text ({error.reason})") from error
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{path}: cannot be read ({error})") from error


def _kind(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix


def _open(path: Path):
    return (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig")


def _split(file, separator: str) -> Iterator[str]:
    if not separator:
        yield file.read()
        return
    rest = ""
    while chunk := file.read(_CHUNK):
        *whole, rest = (rest + chunk).split(separator)
        yield from whole
    yield rest


def _json_texts(file, path: Path, text_key: str) -> Iterator[str]:
    if _kind(path) == ".json" and _first_character(file) == "[":
        for number, value in enumerate(_parse(file.read(), str(path)), start=1):
            yield _text(value, f"{path}, item {number}", text_key)
        return
    for number, line in enumerate(file, start=1):
        if line.strip():
            where = f"{path}, line {number}"
            yield _text(_parse(line, where), where, text_key)


def _first_character(file) -> str:
    character = file.read(1)
    while character.isspace():
        character = file.read(1)
    file.seek(0)
    return character


def _parse(text: str, where: str):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON ({error})") from error


def _text(value, where: str, text_key: str) -> str:
    if isinstance(value, dict):
        if text_key not in value:
            raise DataError(f"{where}: no key {text_key!r} (it has {', '.join(value)}); set data.text_key")
        value = value[text_key]
    if not isinstance(value, str):
        raise DataError(f"{where}: {type(value).__name__} where text was expected")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can escape half a surrogate pair
        raise DataError(f"{where}: not valid Unicode ({error.reason})") from error
    return value
