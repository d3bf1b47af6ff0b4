"""Rows of tokens with random access, in memory or wherever they are kept."""

import dataclasses
from collections.abc import Sequence
from typing import Protocol, Self

import numpy as np

from dlm_jax.data.records import TokenSpan

ROW_MASKS = ("starts", "noisable_mask")


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows in memory.

    Attributes:
      tokens: unsigned or int32 [rows, length].
      starts: bool [rows, length], where a document begins (the first position of a row always does); None
        where documents run on without a boundary.
      maskable: bool [rows, length], where a token may be noised and scored; None: everywhere.
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
        """The names of the bits that are there."""
        return tuple(name for name in ROW_MASKS if getattr(self, name) is not None)

    def __getitem__(self, indices: np.ndarray | Sequence[int] | slice) -> Self:
        """The rows at `indices`, whatever NumPy indexes an axis by."""
        return type(self)(self.tokens[indices], *(plane if plane is None else plane[indices]
                                                  for plane in (self.starts, self.noisable_mask)))

    def with_row_masks(self, row_masks: Sequence[str]) -> Self:
        """The same rows with all of `row_masks` there: one document, and maskable everywhere, unless said otherwise."""
        added = {}
        if "starts" in row_masks and self.starts is None:
            added["starts"] = np.zeros(self.tokens.shape, bool)
            added["starts"][:, 0] = True
        if "noisable_mask" in row_masks and self.noisable_mask is None:
            added["noisable_mask"] = np.ones(self.tokens.shape, bool)
        return dataclasses.replace(self, **added)


class RowSource(Protocol):
    """What rows are drawn from."""

    length: int
    row_masks: tuple[str, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, indices: np.ndarray) -> Rows: ...


class Concatenated:
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
        starts = self._ends - [len(source) for source in self._sources]
        return gather(self._sources, which, indices - starts[which], self.row_masks)


def union_of_row_masks(sources: Sequence[RowSource]) -> tuple[str, ...]:
    return tuple(name for name in ROW_MASKS if any(name in source.row_masks for source in sources))


def gather(sources: Sequence[RowSource], which: np.ndarray, indices: np.ndarray, row_masks: Sequence[str]) -> Rows:
    """Row k is row `indices[k]` of `sources[which[k]]`; each source is asked once."""
    if len(sources) == 1:
        return sources[0][indices].with_row_masks(row_masks)
    order = np.argsort(which, kind="stable")
    found = [source[indices[which == i]].with_row_masks(row_masks) for i, source in enumerate(sources) if (which == i).any()]
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    return Rows(*(None if name in ROW_MASKS and name not in row_masks
                  else np.concatenate([getattr(rows, name) for rows in found])[place]
                  for name in ("tokens", *ROW_MASKS)))


# ---- Documents of any length as rows of one length.


class Packer:
    """Lays pieces end to end and cuts the stream every `length` tokens; what is left over begins the next row."""

    def __init__(self, length: int, rest: TokenSpan | None = None):
        self.length = length
        self.rest = rest or TokenSpan(np.zeros(0, np.uint32), np.zeros(0, bool))

    def add(self, piece: TokenSpan) -> Rows:
        """The rows that `piece` completes, perhaps none."""
        tokens = np.concatenate([self.rest.tokens, piece.tokens])
        starts = np.concatenate([self.rest.starts, piece.starts])
        # Only examples carry `noisable_mask`, and those fill whole rows, so that nothing of them is ever left over.
        noisable_mask = piece.noisable_mask
        whole = len(tokens) // self.length * self.length
        self.rest = TokenSpan(tokens[whole:], starts[whole:])
        rows = starts[:whole].reshape(-1, self.length)
        rows[:, 0] = True
        return Rows(tokens[:whole].reshape(-1, self.length), rows,
                    None if noisable_mask is None else noisable_mask.reshape(-1, self.length))


def segments_of(starts: np.ndarray) -> np.ndarray:
    """Segments counted from 1 in each row; int32 [batch, length] from bool [batch, length]."""
    return np.cumsum(starts, axis=1, dtype=np.int32)


def positions_of(starts: np.ndarray) -> np.ndarray:
    """Positions that restart at 0 with each segment; int32 [batch, length] from bool [batch, length]."""
    index = np.arange(starts.shape[1], dtype=np.int32)
    return index - np.maximum.accumulate(np.where(starts, index, 0), axis=1)
