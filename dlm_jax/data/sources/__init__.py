"""Where raw records come from: what a source is, and which one a specification means.

FILE or GLOB                                        .txt .jsonl .json (also .gz, .zst) .parquet .arrow; any fsspec URL
tfds:NAME[/CONFIG][:VERSION]?split=&data_dir=       prepared by TensorFlow Datasets
hf:NAME?name=&split=&data_dir=&data_files=&revision=   of the Hugging Face hub, or a folder
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from dlm_jax.data.records import BrokenSource, Chunk, Payload
from dlm_jax.data.sources.files import COMPRESSED, File, find_files
from dlm_jax.data.sources.named import HuggingFaceSource, TfdsSource
from dlm_jax.data.sources.tables import ArrowSource, ParquetSource
from dlm_jax.data.sources.texts import JsonSource, LineSource, TextSource
from dlm_jax.errors import DataError

_CHUNK_BYTES = 1 << 20
_CHUNK_RECORDS = 4096
_NAMED: dict[str, Callable[[str], "Source"]] = {"tfds": TfdsSource, "hf": HuggingFaceSource}
_KINDS: dict[str, Callable[[File], "Source"]] = {
    ".jsonl": LineSource, ".json": JsonSource, ".parquet": ParquetSource, ".arrow": ArrowSource}
_TABLES = (".parquet", ".arrow")  # compressed inside


class Source(Protocol):
    """Records in an order.

    Attributes:
      name: a file's path or a dataset's specification, as messages show it.
      unit: what the records are counted in: "line", "item", "row", "document", "example".
      size: bytes of a file as stored, records of a dataset; None where that is not known.
    """

    name: str
    unit: str
    size: int | None

    def identity(self) -> list:
        """Facts, as JSON holds them, that change when the content does."""

    def records(self, start: int = 0, columns: Sequence[str] | None = None) -> Iterator[Payload]:
        """The records from number `start` (of the first: 0) on, read as they are asked for.

        Args:
          columns: the keys that are needed; others may be left out. None: all.

        Raises:
          BrokenSource: it is damaged from some record on.
          DataError: it cannot be read.
        """

    def done(self) -> int:
        """How much of `size` is behind the iterator that was last asked for."""


def open_sources(specs: Sequence[str], *, separator: str = "") -> list[Source]:
    """The sources that specifications mean, in their order, those of a glob sorted, each once.

    Args:
      separator: what parts a .txt file into documents; empty: it is one.

    Raises:
      DataError: one means nothing that is there, or nothing that can be read.
    """
    sources: dict[str, Source] = {}
    for spec in specs:
        if named := _NAMED.get(spec.partition(":")[0] if "://" not in spec else ""):
            if spec not in sources:
                sources[spec] = named(spec)
            continue
        for file in find_files(spec):
            sources.setdefault(file.key, _of_file(file, separator))
    return list(sources.values())


def chunks(source: Source, start: int = 0, columns: Sequence[str] | None = None,
           max_bytes: int = _CHUNK_BYTES) -> Iterator[Chunk]:
    """The records from number `start` on, so many together that they are about `max_bytes`.

    Raises:
      BrokenSource: the source is damaged; the records before that have been given.
      DataError: it cannot be read.
    """
    first, payloads, held, broken = start + 1, [], 0, None
    try:
        for payload in source.records(start, columns):
            payloads.append(payload)
            held += _bytes(payload)
            if held >= max_bytes or len(payloads) == _CHUNK_RECORDS:
                yield Chunk(source.name, source.unit, first, payloads)
                first, payloads, held = first + len(payloads), [], 0
    except BrokenSource as error:
        broken = error
    if payloads:
        yield Chunk(source.name, source.unit, first, payloads)
    if broken:
        raise broken


def _of_file(file: File, separator: str) -> Source:
    if file.kind == ".txt":
        return TextSource(file, separator)
    if file.kind not in _KINDS or (file.kind in _TABLES and file.compression):
        raise DataError(f"{file.name}: not a kind of file this reads (.txt, .jsonl, .json, each also "
                        f"{' or '.join(COMPRESSED)}; {', '.join(_TABLES)})")
    return _KINDS[file.kind](file)


def _bytes(value: Any) -> int:
    """About how much memory a payload takes."""
    if isinstance(value, bytes | str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_bytes, value.values()))
    return sum(map(_bytes, value)) if isinstance(value, list) else 8
