"""Rows of tokens of one length: in memory, concatenated, gathered, and packed from spans of any length."""

import dataclasses
from collections.abc import Sequence
from typing import Protocol, Self

import numpy as np

ROW_MASKS = ("starts", "noisable_mask")


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows in memory.

    Attributes:
      tokens: unsigned or int32 [rows, length].
      starts: bool [rows, length], where a document starts (the first position of a row always does); None
        where documents are concatenated without a boundary.
      noisable_mask: bool [rows, length], where a token may be noised and scored; None: everywhere.
    """

    tokens: np.ndarray
    starts: np.ndarray | None = None
    noisable_mask: np.ndarray | None = None

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @property
    def length(self) -> int:
        return self.tokens.shape[1]

    @property
    def row_masks(self) -> tuple[str, ...]:
        """The names of the masks that are present."""
        return tuple(name for name in ROW_MASKS if getattr(self, name) is not None)

    def __getitem__(self, indices: np.ndarray | Sequence[int] | slice) -> Self:
        """Returns the rows at `indices`, which are whatever NumPy indexes an axis by."""
        return type(self)(self.tokens[indices], *(mask if mask is None else mask[indices]
                                                  for mask in (self.starts, self.noisable_mask)))

    def with_row_masks(self, row_masks: Sequence[str]) -> Self:
        """Returns the same rows with all of `row_masks`; a missing one means one document, or noisable everywhere."""
        added = {}
        if "starts" in row_masks and self.starts is None:
            added["starts"] = np.zeros(self.tokens.shape, bool)
            added["starts"][:, 0] = True
        if "noisable_mask" in row_masks and self.noisable_mask is None:
            added["noisable_mask"] = np.ones(self.tokens.shape, bool)
        return dataclasses.replace(self, **added)


class RowSource(Protocol):
    """Rows with random access."""

    length: int
    row_masks: tuple[str, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, indices: np.ndarray) -> Rows: ...


class ConcatenatedRows:
    """Several row sources, one after the other."""

    def __init__(self, sources: Sequence[RowSource]):
        self._sources = sources
        self._ends = np.cumsum([len(source) for source in sources])
        self.length = sources[0].length
        self.row_masks = union_of_row_masks(sources)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, indices: np.ndarray) -> Rows:
        indices = np.arange(len(self))[indices]
        which = np.searchsorted(self._ends, indices, side="right")
        first = self._ends - [len(source) for source in self._sources]
        return gather_rows(self._sources, which, indices - first[which], self.row_masks)


def union_of_row_masks(sources: Sequence[RowSource]) -> tuple[str, ...]:
    """Returns the names of the masks that any of the sources has."""
    return tuple(name for name in ROW_MASKS if any(name in source.row_masks for source in sources))


def gather_rows(sources: Sequence[RowSource], which: np.ndarray, indices: np.ndarray,
                row_masks: Sequence[str]) -> Rows:
    """Returns row `indices[k]` of `sources[which[k]]` for each k; each source is asked once."""
    if len(sources) == 1:
        return sources[0][indices].with_row_masks(row_masks)
    found = [source[indices[which == i]].with_row_masks(row_masks)
             for i, source in enumerate(sources) if (which == i).any()]
    order = np.argsort(np.argsort(which, kind="stable"))
    return Rows(*(None if name in ROW_MASKS and name not in row_masks
                  else np.concatenate([getattr(rows, name) for rows in found])[order]
                  for name in ("tokens", *ROW_MASKS)))


@dataclasses.dataclass(frozen=True)
class TokenSpan:
    """Concatenated documents or examples.

    Attributes:
      tokens: uint32 [tokens].
      starts: bool [tokens]; True where a document starts.
      noisable_mask: bool [tokens], where a token may be noised and scored; None: everywhere.
    """

    tokens: np.ndarray
    starts: np.ndarray
    noisable_mask: np.ndarray | None = None


class RowPacker:
    """Concatenates spans and cuts the stream every `length` tokens.

    Attributes:
      remainder: the tokens of the next row, fewer than `length`.
    """

    def __init__(self, length: int):
        self.length = length
        self.remainder = TokenSpan(np.zeros(0, np.uint32), np.zeros(0, bool))

    def add(self, span: TokenSpan) -> Rows:
        """Returns the rows that `span` completes, perhaps none."""
        tokens = np.concatenate([self.remainder.tokens, span.tokens])
        starts = np.concatenate([self.remainder.starts, span.starts])
        end = len(tokens) // self.length * self.length
        self.remainder = TokenSpan(tokens[end:], starts[end:])
        starts = starts[:end].reshape(-1, self.length)
        starts[:, 0] = True
        # Only examples carry a `noisable_mask`, and they fill their rows, so that it never has a remainder.
        noisable_mask = span.noisable_mask
        return Rows(tokens[:end].reshape(-1, self.length), starts,
                    None if noisable_mask is None else noisable_mask.reshape(-1, self.length))


def segment_ids_from_starts(starts: np.ndarray) -> np.ndarray:
    """Returns segment ids that count from 1 in each row; int32 [batch, length] from bool [batch, length]."""
    return np.cumsum(starts, axis=1, dtype=np.int32)


def positions_from_starts(starts: np.ndarray) -> np.ndarray:
    """Returns positions that restart at 0 in each segment; int32 [batch, length] from bool [batch, length]."""
    index = np.arange(starts.shape[1], dtype=np.int32)
    return index - np.maximum.accumulate(np.where(starts, index, 0), axis=1)
