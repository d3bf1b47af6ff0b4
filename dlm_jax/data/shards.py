"""Rows in ArrayRecord files: how rows become records, and how files become rows again."""

import dataclasses
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from dlm_jax.data.rows import Rows
from dlm_jax.errors import DataError
from dlm_jax.storage import is_remote, put_file

# One record per group, so that a row is read alone; token ids compress too little to be worth the time.
_WRITER_OPTIONS = "group_size:1,uncompressed"


@dataclasses.dataclass(frozen=True)
class RowLayout:
    """The bytes of a row: its tokens, little-endian, then one bit per token for each mask.

    Attributes:
      length: tokens per row.
      dtype: "uint16" or "uint32".
      row_masks: of `rows.ROW_MASKS`.
    """

    length: int
    dtype: str
    row_masks: tuple[str, ...]

    @classmethod
    def for_vocab(cls, length: int, vocab_size: int, row_masks: Sequence[str]) -> "RowLayout":
        return cls(length, "uint16" if vocab_size <= 1 << 16 else "uint32", tuple(row_masks))

    @property
    def _token_bytes(self) -> int:
        return self.length * np.dtype(self.dtype).itemsize

    @property
    def _mask_bytes(self) -> int:
        return -(-self.length // 8)

    @property
    def row_bytes(self) -> int:
        return self._token_bytes + len(self.row_masks) * self._mask_bytes

    def encode(self, rows: Rows) -> np.ndarray:
        """Returns the bytes of rows, uint8 [rows, row_bytes]."""
        rows = rows.with_row_masks(self.row_masks)
        tokens = rows.tokens.astype(np.dtype(self.dtype).newbyteorder("<"))
        masks = [np.packbits(getattr(rows, name), axis=1) for name in self.row_masks]
        return np.concatenate([tokens.view(np.uint8), *masks], axis=1)

    def decode(self, records: Sequence[bytes]) -> Rows:
        """Returns the rows whose bytes are given."""
        data = np.frombuffer(b"".join(records), np.uint8).reshape(len(records), self.row_bytes)
        tokens = np.ascontiguousarray(data[:, :self._token_bytes]).view(np.dtype(self.dtype).newbyteorder("<"))
        row_masks = {}
        for k, name in enumerate(self.row_masks):
            start = self._token_bytes + k * self._mask_bytes
            bits = np.unpackbits(data[:, start : start + self._mask_bytes], axis=1, count=self.length)
            row_masks[name] = bits.view(bool)
        return Rows(tokens, **row_masks)


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file of rows, as the manifest lists it."""

    file: str
    rows: int
    bytes: int


def write_shard(directory: str, file: str, blocks: Iterable[np.ndarray]) -> Shard:
    """Writes encoded rows (uint8 [n, row_bytes]) as one file, atomically.

    Raises:
      DataError: it cannot be written.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    remote, count = is_remote(directory), 0
    try:
        with tempfile.TemporaryDirectory(dir=None if remote else directory, prefix=".writing-") as folder:
            local = os.path.join(folder, file)
            writer = ArrayRecordWriter(local, _WRITER_OPTIONS)
            for block in blocks:
                for row in block:
                    writer.write(row.tobytes())
                count += len(block)
            writer.close()
            size = os.path.getsize(local)
            put_file(local, f"{directory}/{file}")
    except (OSError, RuntimeError) as error:
        raise DataError(f"{directory}/{file} cannot be written: {error}") from error
    return Shard(file, count, size)


class ShardedRows:
    """The rows of a list of shards: a `RowSource` that opens files when they are needed and can be pickled.

    Raises:
      DataError: a file is missing, or its size is not the one it was written with.
    """

    def __init__(self, directory: str, shards: Sequence[Shard], layout: RowLayout):
        from grain.sources import ArrayRecordDataSource

        self.length, self.row_masks, self._layout = layout.length, layout.row_masks, layout
        self._count = sum(shard.rows for shard in shards)
        for shard in shards:
            path = Path(directory, shard.file)
            if not path.is_file():
                raise DataError(f"{path} is missing, but the manifest lists it; prepare the corpus again")
            if path.stat().st_size != shard.bytes:
                raise DataError(f"{path} has {path.stat().st_size:,} bytes, not the {shard.bytes:,} it was written "
                                "with; copy it again, or prepare the corpus again")
        # With the counts given, no file is opened before it is read.
        self._records = ArrayRecordDataSource(
            [f"{directory}/{shard.file}[0:{shard.rows}]" for shard in shards]) if self._count else None

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, indices: np.ndarray) -> Rows:
        indices = np.arange(self._count)[indices].tolist()
        if not indices:
            return Rows(np.zeros((0, self.length), self._layout.dtype)).with_row_masks(self.row_masks)
        try:
            return self._layout.decode(self._records.__getitems__(indices))
        except (RuntimeError, ValueError) as error:  # what ArrayRecord raises where a checksum does not match
            raise DataError(f"rows cannot be read, a file is damaged ({error}); prepare the corpus again") from error
