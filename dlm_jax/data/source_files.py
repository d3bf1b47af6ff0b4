"""Sources of raw records, and those that are files: text, JSON, Parquet and Arrow."""

import abc
import codecs
import io
import itertools
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO

from dlm_jax.data.files import BLOCK, File, one_line
from dlm_jax.data.records import BrokenSource, RawRecord
from dlm_jax.errors import DataError, DLMError
from dlm_jax.storage import is_remote

if TYPE_CHECKING:
    import pyarrow

_BOM = b"\xef\xbb\xbf"
_TABLE_ROWS = 1024  # rows of a table that become Python objects at a time


class Source(abc.ABC):
    """An ordered collection of raw records.

    Attributes:
      name: a file's path or a dataset's specification, as messages show it.
      unit: what its records are called in messages: "line", "item", "row", "document", "example".
      size: bytes of a file as stored, or records of a dataset; None where unknown.
      identity: facts, serializable as JSON, that change when the content does.
      consumed: how much of `size` the last iterator has read.
    """

    name: str
    unit: str
    size: int | None
    identity: list
    consumed = 0

    def records(self, start: int = 0, columns: Sequence[str] | None = None) -> Iterator[RawRecord]:
        """Yields the records from number `start` (from 0) on, reading lazily.

        Args:
          columns: the keys that are needed; others may be missing. None: all.

        Raises:
          BrokenSource: the source is damaged from some record on.
          DataError: it cannot be read, for instance because a store does not answer, or it has none of the columns.
        """
        number = start
        try:
            for record in self._read(start, columns):
                yield record
                number += 1
        except DLMError:
            raise
        except Exception as error:  # each format and each store has errors of its own
            if _is_damage(error):
                raise BrokenSource(f"{self.name}: damaged after {self.unit} {number} ({one_line(error)})") from error
            raise DataError(f"{self.name}: cannot be read after {self.unit} {number} ({one_line(error)})") from error

    @abc.abstractmethod
    def _read(self, start: int, columns: Sequence[str] | None) -> Iterator[RawRecord]: ...


def select_columns(name: str, available: Sequence[str], columns: Sequence[str] | None) -> list[str] | None:
    """Returns the needed columns that the source `name` has, in its own order; None: all.

    Raises:
      DataError: it has none of them. (Where only some are missing, records can do without or report what they miss.)
    """
    if columns is None:
        return None
    found = [column for column in available if column in columns]
    if columns and not found:
        missing = " or ".join(map(repr, columns))
        raise DataError(f"{name}: no column {missing} (it has {', '.join(available)}); set data.text_key, or the keys "
                        "of data.examples")
    return found


def _is_damage(error: Exception) -> bool:
    """Returns whether the content is wrong, rather than the disk or the network."""
    # UnicodeDecodeError, JSONDecodeError and ArrowInvalid are ValueErrors; Arrow also raises OSErrors without an errno.
    if isinstance(error, OSError):
        return error.errno is None and not isinstance(error, ConnectionError | TimeoutError)
    return isinstance(error, EOFError | ValueError | zlib.error) or type(error).__name__ == "ZstdError"


class FileSource(Source):
    """The records of one file."""

    def __init__(self, file: File):
        self.file, self.name, self.size = file, file.name, file.size
        self.identity = [file.key, file.size, file.version]


class _StreamSource(FileSource):
    """A file, perhaps compressed, that is read from its start."""

    def _read(self, start: int, columns: Sequence[str] | None) -> Iterator[RawRecord]:
        with self.file.open() as stored:
            for record in itertools.islice(self._parse(self.file.decompress(stored)), start, None):
                self.consumed = stored.tell()
                yield record
        self.consumed = self.size or self.consumed

    @abc.abstractmethod
    def _parse(self, stream: BinaryIO) -> Iterator[RawRecord]: ...


class TextSource(_StreamSource):
    """Plain text, split into documents at `separator`; empty: the file is one document."""

    unit = "document"

    def __init__(self, file: File, separator: str = ""):
        super().__init__(file)
        self._separator = separator

    def _parse(self, stream: BinaryIO) -> Iterator[str]:
        blocks = _decode_text(stream)
        if self._separator:
            yield from split_text(blocks, self._separator)
        elif text := "".join(blocks):
            yield text


class LineSource(_StreamSource):
    """JSON lines, unparsed and blank ones included, so that workers can parse them in parallel."""

    unit = "line"

    def _parse(self, stream: BinaryIO) -> Iterator[bytes]:
        return iter(stream)


class JsonSource(_StreamSource):
    """A .json file: a list of values, one value per line, or one object over several lines, which is one record."""

    unit = "line"  # until the first character shows a list

    def _parse(self, stream: BinaryIO) -> Iterator[RawRecord]:
        head = b""
        while byte := stream.read(1):
            head += byte
            if not (byte.isspace() or byte in _BOM):
                break
        if head.endswith(b"["):
            self.unit = "item"
            yield from json.loads(head + stream.read())
            return
        first = head + stream.readline()
        if head.endswith(b"{") and _parse_json(first) is None:
            rest = stream.read()
            if (value := _parse_json(first + rest)) is not None:
                self.unit = "item"
                yield value
                return
            stream = io.BytesIO(rest)
        yield from itertools.chain(io.BytesIO(first), stream)


def _parse_json(text: bytes) -> Any:
    """Returns the value of a JSON text, None if it is not JSON."""
    try:
        return json.loads(text)
    except ValueError:
        return None


class _TableSource(FileSource):
    """A file that is read in batches of rows."""

    unit = "row"

    def _read(self, start: int, columns: Sequence[str] | None) -> Iterator[dict[str, Any]]:
        self.consumed = 0
        for first_row, batch, consumed in self._batches(start, columns):
            for first in range(max(start - first_row, 0), batch.num_rows, _TABLE_ROWS):
                yield from batch.slice(first, _TABLE_ROWS).to_pylist()
            self.consumed = consumed
        self.consumed = self.size or self.consumed

    @abc.abstractmethod
    def _batches(self, start: int, columns: Sequence[str] | None) -> "Iterator[tuple[int, pyarrow.RecordBatch, int]]":
        """Yields (number of the first row, rows, bytes of the file read by then), from row `start` or before it."""


class ParquetSource(_TableSource):
    """Parquet: row groups before the first row that is asked for are not read."""

    def _batches(self, start: int, columns: Sequence[str] | None) -> "Iterator[tuple[int, pyarrow.RecordBatch, int]]":
        import pyarrow.parquet

        remote = is_remote(self.name)
        with self.file.open() as stored, pyarrow.parquet.ParquetFile(
                stored if remote else self.name, pre_buffer=remote) as table:
            selected = select_columns(self.name, table.schema_arrow.names, columns)
            group = number = 0
            while group < table.num_row_groups and number + table.metadata.row_group(group).num_rows <= start:
                number += table.metadata.row_group(group).num_rows
                group += 1
            for batch in table.iter_batches(_TABLE_ROWS, row_groups=range(group, table.num_row_groups),
                                            columns=selected):
                yield number, batch, (self.size or 0) * (number + batch.num_rows) // table.metadata.num_rows
                number += batch.num_rows


class ArrowSource(_TableSource):
    """Arrow's IPC formats: the file, and the stream that `datasets` keeps in its cache."""

    def _batches(self, start: int, columns: Sequence[str] | None) -> "Iterator[tuple[int, pyarrow.RecordBatch, int]]":
        import pyarrow.ipc

        with self.file.open() as stored, (
                pyarrow.PythonFile(stored, "r") if is_remote(self.name) else pyarrow.memory_map(self.name)) as file:
            is_file = file.read(6) == b"ARROW1"
            open_table = pyarrow.ipc.open_file if is_file else pyarrow.ipc.open_stream
            file.seek(0)
            names = open_table(file).schema.names
            selected = select_columns(self.name, names, columns)
            fields = None if selected is None else sorted(map(names.index, selected))
            file.seek(0)
            table = open_table(file, options=pyarrow.ipc.IpcReadOptions(included_fields=fields))
            count, number = table.num_record_batches if is_file else None, 0
            for index, batch in enumerate(map(table.get_batch, range(count)) if is_file else table, 1):
                yield number, batch, (self.size or 0) * index // count if is_file else file.tell()
                number += batch.num_rows


def _decode_text(stream: BinaryIO) -> Iterator[str]:
    """Decodes UTF-8 block by block, so that text before damage is not lost; line ends become "\\n"."""
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8-sig")(), translate=True)
    while block := stream.read1(BLOCK):
        yield decoder.decode(block)
    yield decoder.decode(b"", final=True)


def split_text(blocks: Iterable[str], separator: str) -> Iterator[str]:
    """Splits a text that comes in blocks as `str.split` does, except that an empty last document is not yielded."""
    held: list[str] = []  # the start of a document; its end, which may be the start of a separator, is the tail
    tail = ""
    for block in blocks:
        document, *others = (tail + block).split(separator)
        if others:
            yield "".join(held) + document
            yield from others[:-1]
            held, document = [], others[-1]
        end = max(len(document) - len(separator) + 1, 0)
        held.append(document[:end])
        tail = document[end:]
    if last := "".join(held) + tail:
        yield last
