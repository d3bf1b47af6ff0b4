"""Rows of tokens with random access, in memory or wherever they are kept."""

import dataclasses
from collections.abc import Sequence
from typing import Protocol, Self

import numpy as np

PLANES = ("starts", "maskable")


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
    maskable: np.ndarray | None = None

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @property
    def length(self) -> int:
        return self.tokens.shape[1]

    @property
    def planes(self) -> tuple[str, ...]:
        """The names of the bits that are there."""
        return tuple(name for name in PLANES if getattr(self, name) is not None)

    def __getitem__(self, indices: np.ndarray | Sequence[int] | slice) -> Self:
        """The rows at `indices`, whatever NumPy indexes an axis by."""
        return type(self)(self.tokens[indices], *(plane if plane is None else plane[indices]
                                                  for plane in (self.starts, self.maskable)))

    def with_planes(self, planes: Sequence[str]) -> Self:
        """The same rows with all of `planes` there: one document, and maskable everywhere, unless said otherwise."""
        added = {}
        if "starts" in planes and self.starts is None:
            added["starts"] = np.zeros(self.tokens.shape, bool)
            added["starts"][:, 0] = True
        if "maskable" in planes and self.maskable is None:
            added["maskable"] = np.ones(self.tokens.shape, bool)
        return dataclasses.replace(self, **added)


class RowSource(Protocol):
    """What rows are drawn from."""

    length: int
    planes: tuple[str, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, indices: np.ndarray) -> Rows: ...


class Concatenated:
    """Several row sources, one after the other."""

    def __init__(self, sources: Sequence[RowSource]):
        self._sources = sources
        self._ends = np.cumsum([len(source) for source in sources])
        self.length = sources[0].length
        self.planes = union_of_planes(sources)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, indices: np.ndarray) -> Rows:
        indices = np.arange(len(self))[indices]
        which = np.searchsorted(self._ends, indices, side="right")
        starts = self._ends - [len(source) for source in self._sources]
        return gather(self._sources, which, indices - starts[which], self.planes)


def union_of_planes(sources: Sequence[RowSource]) -> tuple[str, ...]:
    return tuple(name for name in PLANES if any(name in source.planes for source in sources))


def gather(sources: Sequence[RowSource], which: np.ndarray, indices: np.ndarray, planes: Sequence[str]) -> Rows:
    """Row k is row `indices[k]` of `sources[which[k]]`; each source is asked once."""
    if len(sources) == 1:
        return sources[0][indices].with_planes(planes)
    order = np.argsort(which, kind="stable")
    found = [source[indices[which == i]].with_planes(planes) for i, source in enumerate(sources) if (which == i).any()]
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    return Rows(*(None if name in PLANES and name not in planes
                  else np.concatenate([getattr(rows, name) for rows in found])[place]
                  for name in ("tokens", *PLANES)))
