"""Rows of tokens with random access, in memory or mapped from a file."""

import dataclasses
import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from dlm_jax.errors import DataError

_MANIFEST, _TOKENS, _SEGMENTS = "rows.json", "tokens.int32", "segments.int32"


@dataclasses.dataclass(frozen=True)
class Rows:
    """Attributes:
    tokens: int32 [rows, length].
    segment_ids: int32 [rows, length], or None where documents run on without a boundary.
    """

    tokens: np.ndarray
    segment_ids: np.ndarray | None = None

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @property
    def length(self) -> int:
        return self.tokens.shape[1]

    def __getitem__(self, indices) -> "Rows":
        """The rows at `indices` (whatever NumPy indexes an axis by), copied to memory for a list or array."""
        segment_ids = None if self.segment_ids is None else self.segment_ids[indices]
        return Rows(self.tokens[indices], segment_ids)


def write(directory: Path, blocks: Iterable[tuple[np.ndarray, np.ndarray]], *, length: int, segments: bool) -> None:
    """Streams blocks of (tokens, segment ids) [n, length] into `directory`, which appears once complete.

    Raises:
      DataError: it cannot be written.
    """
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=directory.name + ".", dir=directory.parent) as beside:
            _write(Path(beside) / "rows", blocks, length, segments)
            os.rename(Path(beside) / "rows", directory)
    except OSError as error:
        if not (directory / _MANIFEST).is_file():  # else another process wrote the same rows first
            raise DataError(f"{directory}: the rows cannot be written ({error})") from error


def _write(directory: Path, blocks: Iterable[tuple[np.ndarray, np.ndarray]], length: int, segments: bool) -> None:
    directory.mkdir()
    count = 0
    with open(directory / _TOKENS, "wb") as token_file, open(directory / _SEGMENTS, "wb") as segment_file:
        for tokens, segment_ids in blocks:
            tokens.astype("<i4").tofile(token_file)
            if segments:
                segment_ids.astype("<i4").tofile(segment_file)
            count += len(tokens)
    manifest = {"rows": count, "length": length, "segments": segments}
    (directory / _MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")


def read(directory: Path) -> Rows:
    """Maps the rows that `write` left in `directory`.

    Raises:
      DataError: a file is missing or shorter than the manifest says.
    """
    try:
        manifest = json.loads((directory / _MANIFEST).read_text(encoding="utf-8"))
        shape = manifest["rows"], manifest["length"]
        tokens = _map(directory / _TOKENS, shape)
        return Rows(tokens, _map(directory / _SEGMENTS, shape) if manifest["segments"] else None)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"the cached rows in {directory} are damaged ({error}); remove it") from error


def _map(path: Path, shape: tuple[int, int]) -> np.ndarray:
    size, expected = path.stat().st_size, 4 * shape[0] * shape[1]
    if size != expected:
        raise ValueError(f"{path.name} has {size} bytes, not {expected}")
    if shape[0] == 0:  # an empty file cannot be mapped
        return np.zeros(shape, np.int32)
    return np.memmap(path, "<i4", "r", shape=shape)
