"""Parquet and Arrow files: tables, of which only the needed columns and row groups are read."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from dlm_jax.data.sources.files import FileSource
from dlm_jax.data.sources.reading import columns_in
from dlm_jax.storage import is_remote

if TYPE_CHECKING:
    import pyarrow

_ROWS = 1024  # that become Python objects at a time


class _TableSource(FileSource):
    """A file that comes in batches of rows."""

    unit = "row"
    _reached = 0

    def done(self) -> int:
        return self._reached

    def _read(self, start: int, columns: Sequence[str] | None) -> Iterator[dict[str, Any]]:
        self._reached = 0
        for number, batch, ensure_accessible in self._batches(start, columns):
            for first in range(max(start - number, 0), batch.num_rows, _ROWS):
                yield from batch.slice(first, _ROWS).to_pylist()
            self._reached = ensure_accessible
        self._reached = self.size or self._reached

    def _batches(self, start: int, columns: Sequence[str] | None) -> "Iterator[tuple[int, pyarrow.RecordBatch, int]]":
        """(number of the first row, rows, bytes of the file then behind us), from row `start` or before it."""
        raise NotImplementedError


class ParquetSource(_TableSource):
    """Parquet: row groups before the first row that is asked for are not read."""

    def _batches(self, start: int, columns: Sequence[str] | None) -> "Iterator[tuple[int, pyarrow.RecordBatch, int]]":
        import pyarrow.parquet

        remote = is_remote(self.name)
        with self.file.open() as raw, pyarrow.parquet.ParquetFile(
                raw if remote else self.name, pre_buffer=remote) as table:
            wanted = columns_in(self.name, table.schema_arrow.names, columns)
            group = number = 0
            while group < table.num_row_groups and number + table.metadata.row_group(group).num_rows <= start:
                number += table.metadata.row_group(group).num_rows
                group += 1
            for batch in table.iter_batches(_ROWS, row_groups=range(group, table.num_row_groups), columns=wanted):
                yield number, batch, (self.size or 0) * (number + batch.num_rows) // table.metadata.num_rows
                number += batch.num_rows


class ArrowSource(_TableSource):
    """Arrow's IPC formats: the file, and the stream that `datasets` keeps in its cache."""

    def _batches(self, start: int, columns: Sequence[str] | None) -> "Iterator[tuple[int, pyarrow.RecordBatch, int]]":
        import pyarrow.ipc

        with self.file.open() as raw, (
                pyarrow.PythonFile(raw, "r") if is_remote(self.name) else pyarrow.memory_map(self.name)) as file:
            is_file = file.read(6) == b"ARROW1"
            open_ = pyarrow.ipc.open_file if is_file else pyarrow.ipc.open_stream
            file.seek(0)
            names = open_(file).schema.names
            wanted = columns_in(self.name, names, columns)
            only = None if wanted is None else sorted(map(names.index, wanted))
            file.seek(0)
            table = open_(file, options=pyarrow.ipc.IpcReadOptions(included_fields=only))
            number = 0
            for batch, ensure_accessible in self._of_file(table) if is_file else ((batch, file.tell()) for batch in table):
                yield number, batch, ensure_accessible
                number += batch.num_rows

    def _of_file(self, table: "pyarrow.RecordBatchFileReader") -> "Iterator[tuple[pyarrow.RecordBatch, int]]":
        count = table.num_record_batches
        for index in range(count):
            yield table.get_batch(index), (self.size or 0) * (index + 1) // count
