"""Batches as a function of the step."""

from collections.abc import Callable, Sequence
from typing import Any

import grain
import numpy as np

from dlm_jax.data.batch import Batch
from dlm_jax.data.mixture import Mixture
from dlm_jax.data.packing import positions_of, segments_of
from dlm_jax.data.rows import Rows, RowSource
from dlm_jax.errors import DataError


class Loader:
    """Gives the batch of any step, the same whenever and wherever it is asked for."""

    def __init__(self, sources: Sequence[RowSource], batch_size: int, *, weights: Sequence[float] = (), seed: int = 0,
                 shuffle: bool = True, random_length: float = 0.0):
        """Args:
        sources: what to draw from; batches run on from one time through a source to the next.
        batch_size: rows in the global batch.
        weights: share of each source, needed if there are several; see `Mixture`.
        seed: decides the order.
        shuffle: reorder a source each time through; else its rows come in order.
        random_length: share of the rows that are cut to a random length (LLaDA's 1%); the rest of such a row is
          padding, which is neither seen nor noised nor scored.
        """
        if not sources or not all(len(source) for source in sources):
            raise DataError("there is no row to draw batches from")
        self.mixture = Mixture(sources, weights, seed=seed, shuffle=shuffle)
        self.batch_size, self.seed, self.random_length = batch_size, seed, random_length

    def batch(self, step: int, rows: slice | None = None) -> Batch:
        """The batch of a step as NumPy arrays, or the part of it at `rows` of the global batch."""
        examples = np.arange(self.batch_size, dtype=np.int64)[rows or slice(None)] + step * self.batch_size
        drawn = self.mixture[examples]
        if self.random_length:
            drawn = cut(drawn, random_lengths(examples, self.random_length, drawn.length, self.seed))
        maskable = np.ones(drawn.tokens.shape, bool) if drawn.maskable is None else drawn.maskable.copy()
        maskable[:, 0] = False
        positions = segment_ids = None
        if drawn.starts is not None:
            positions, segment_ids = positions_of(drawn.starts), segments_of(drawn.starts)
            maskable &= positions > 0  # a segment's first position is its context
        return Batch(tokens=drawn.tokens.astype(np.int32), maskable=maskable, example_index=examples.astype(np.uint32),
                     segment_ids=segment_ids, positions=positions)

    def batches(self, start_step: int = 0, place: Callable[[Callable[[slice], Batch]], Any] | None = None,
                threads: int = 2, ahead: int = 4) -> grain.DatasetIterator:
        """Iterates over the batches from a step on, read ahead by threads; close it when done.

        Args:
          place: makes of `read`, a function from slices of the global batch to that part of it, what is iterated
            over: `place(read)`. It decides which rows this process reads at all. None: whole batches.
        """
        steps = grain.MapDataset.source(_Steps(self, place or (lambda read: read(slice(None)))))
        return iter(steps[start_step:].to_iter_dataset(grain.ReadOptions(threads, ahead)))


class _Steps:
    """The batches as Grain sees them: a source with random access, one element a step."""

    def __init__(self, loader: Loader, place: Callable[[Callable[[slice], Batch]], Any]):
        self._loader, self._place = loader, place

    def __len__(self) -> int:
        return 1 << 40  # without end

    def __getitem__(self, step: int) -> Any:
        return self._place(lambda rows: self._loader.batch(step, rows))


def cut(rows: Rows, lengths: np.ndarray) -> Rows:
    """Rows of which the first `lengths` [rows] tokens count; what follows is a segment of its own, not maskable."""
    rows = rows.with_planes(("starts", "maskable"))
    index = np.arange(rows.length)
    return Rows(rows.tokens, np.where(index < lengths[:, None], rows.starts, index == lengths[:, None]),
                rows.maskable & (index < lengths[:, None]))


def random_lengths(examples: np.ndarray, share: float, length: int, seed: int) -> np.ndarray:
    """For a `share` of the examples a length drawn from 2..length, for the others `length`; int [examples]."""
    chosen, drawn = (_uniform(examples, seed, draw) for draw in range(2))
    return np.where(chosen < share, 2 + (drawn * (length - 1)).astype(np.int64), length)


def _uniform(examples: np.ndarray, seed: int, draw: int) -> np.ndarray:
    """Numbers in [0, 1) that depend on (seed, draw, example) alone: splitmix64 (Steele, Lea and Flood, 2014)."""
    with np.errstate(over="ignore"):
        x = examples.astype(np.uint64) + np.uint64((seed * 2 + draw + 1) * 0x9E3779B97F4A7C15 % 2**64)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
        return ((x ^ (x >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53
