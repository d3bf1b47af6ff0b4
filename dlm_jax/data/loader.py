"""The batch of any step as a pure function of the step: the mixture of row sources, and the loader."""

import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import grain
import numpy as np
from grain.experimental import index_shuffle

from dlm_jax.data.rows import (
    Rows,
    RowSource,
    gather_rows,
    positions_from_starts,
    segment_ids_from_starts,
    union_of_row_masks,
)
from dlm_jax.diffusion import Batch
from dlm_jax.errors import DataError
from dlm_jax.random import uniform_by_index

_LONGEST_PERIOD = 1 << 20
_LAST_STEP = 1 << 40  # endless
_THREADS, _READ_AHEAD = 2, 4  # batches are read ahead


class Loader:
    """Gives the batch of any step, the same on every host and after every restart."""

    def __init__(self, sources: Sequence[RowSource], batch_size: int, *, weights: Sequence[float] = (), seed: int = 0,
                 shuffle: bool = True, random_length: float = 0.0):
        """Initializes the loader.

        Args:
          sources: rows of one length; batches continue from one epoch of a source to the next.
          batch_size: rows in the global batch.
          weights: the share of each source, needed if there are several; see `Mixture`.
          seed: decides the order.
          shuffle: reshuffle a source in each epoch; else its rows come in order.
          random_length: share of the rows that are cut to a random length (1% in LLaDA, arXiv:2502.09992); the rest
            of such a row is padding, which is neither attended to nor noised nor scored.

        Raises:
          DataError: there is no source, or one has no rows.
        """
        if not sources or not all(len(source) for source in sources):
            raise DataError("there is no row to make batches from")
        self.mixture = Mixture(sources, weights, seed=seed, shuffle=shuffle)
        self.batch_size, self.seed, self.random_length = batch_size, seed, random_length

    def batch(self, step: int, rows: slice | None = None) -> Batch:
        """Returns the batch of a step as NumPy arrays, or its rows at the slice `rows` of the global batch."""
        examples = np.arange(self.batch_size, dtype=np.int64)[rows or slice(None)] + step * self.batch_size
        mixed = self.mixture[examples]
        if self.random_length:
            mixed = truncate_rows(mixed, random_lengths(examples, self.random_length, mixed.length, self.seed))
        noisable_mask = np.ones(mixed.tokens.shape, bool) if mixed.noisable_mask is None else mixed.noisable_mask.copy()
        noisable_mask[:, 0] = False
        positions = segment_ids = None
        if mixed.starts is not None:
            positions, segment_ids = positions_from_starts(mixed.starts), segment_ids_from_starts(mixed.starts)
            noisable_mask &= positions > 0  # the first position of a segment is its context
        return Batch(tokens=mixed.tokens.astype(np.int32), noisable_mask=noisable_mask,
                     example_index=examples.astype(np.uint32), segment_ids=segment_ids, positions=positions)

    def batches(self, start_step: int = 0,
                place: Callable[[Callable[[slice], Batch]], Any] | None = None) -> grain.DatasetIterator:
        """Iterates over the batches from a step on, read ahead by threads; close it when done.

        Args:
          place: called as `place(read)`, where `read(slice)` returns those rows of the global batch; its result is
            what is iterated over. It decides which rows this process reads at all. None: the global batch.
        """
        place = place or (lambda read: read(slice(None)))
        steps = grain.MapDataset.range(start_step, _LAST_STEP).map(
            lambda step: place(lambda rows: self.batch(int(step), rows)))
        return iter(steps.to_iter_dataset(grain.ReadOptions(_THREADS, _READ_AHEAD)))


def truncate_rows(rows: Rows, lengths: np.ndarray) -> Rows:
    """Truncates rows to their first `lengths` [rows] tokens; the rest is a segment of its own, not noisable."""
    rows = rows.with_row_masks(("starts", "noisable_mask"))
    index = np.arange(rows.length)
    return Rows(rows.tokens, np.where(index < lengths[:, None], rows.starts, index == lengths[:, None]),
                rows.noisable_mask & (index < lengths[:, None]))


def random_lengths(examples: np.ndarray, share: float, length: int, seed: int) -> np.ndarray:
    """Returns a random length in 2..length for a `share` of the examples, `length` for the others; int [examples]."""
    chosen, random = (uniform_by_index(examples, seed, stream) for stream in range(2))
    return np.where(chosen < share, 2 + (random * (length - 1)).astype(np.int64), length)


class Mixture:
    """An endless sequence of rows from several sources, each of which is repeated in new orders.

    Among the first n rows, a source of weight w (a share of 1) has w n, to within one row.
    """

    def __init__(self, sources: Sequence[RowSource], weights: Sequence[float] = (), *, seed: int = 0,
                 shuffle: bool = True):
        """Initializes the mixture.

        Args:
          sources: rows of one length.
          weights: one per source, in any unit; needed if there are several sources.
          seed: decides the order.
          shuffle: reshuffle a source in each epoch; else its rows come in order.

        Raises:
          DataError: the weights do not match the sources, or differ too much.
        """
        if len(weights or (1,)) != len(sources):
            raise DataError(f"{len(sources)} sources to mix need as many weights, not {len(weights)}")
        self.sources, self.seed, self.shuffle = sources, seed, shuffle
        self.row_masks = union_of_row_masks(sources)
        self._which, self._nth, self._counts = interleaving(tuple(weights or (1.0,)))

    def __getitem__(self, examples: np.ndarray) -> Rows:
        """Returns the rows at some indices of the sequence."""
        which, nth = self.locate(examples)
        indices = np.empty_like(nth)
        for i, source in enumerate(self.sources):
            indices[which == i] = self._row_indices(i, nth[which == i], len(source))
        return gather_rows(self.sources, which, indices, self.row_masks)

    def locate(self, examples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns, for each index of the sequence, its source and how many rows that source has given before."""
        period, offset = np.divmod(examples, len(self._which))
        which = self._which[offset]
        return which, period * self._counts[which] + self._nth[offset]

    def _row_indices(self, source: int, nth: np.ndarray, count: int) -> np.ndarray:
        if not self.shuffle:
            return nth % count
        # The order of the first source does not depend on whether there are others.
        return np.array([shuffled_index(n, count, self.seed, source) for n in nth.tolist()], np.int64)


def shuffled_index(n: int, count: int, seed: int, source: int = 0) -> int:
    """Returns element n of the sequence that repeats 0..count-1, in a new order in each epoch."""
    epoch, index = divmod(n, count)
    return index_shuffle(index, max_index=count - 1, seed=_epoch_seed(seed, epoch, source), rounds=4)


@functools.lru_cache(maxsize=256)
def _epoch_seed(seed: int, epoch: int, source: int) -> int:
    text = f"{seed},{epoch}" + (f",{source}" if source else "")
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big")


@functools.lru_cache(maxsize=4)
def interleaving(weights: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Computes one period of the interleaving of sources with these weights.

    Each position goes to the source whose next row is due first, among those whose share has grown enough to have one
    (R. Tijdeman, The chairman assignment problem, 1980): no prefix then deviates by more than 1 - 1/(2k - 2) rows
    from the shares of k sources.

    Returns:
      For each position of the period its source [period] and the number of earlier positions with that source
      [period]; and the number of positions of each source in a period [k].
    """
    counts = period_counts(weights)
    period, k = int(counts.sum()), len(counts)
    if k == 1:
        return np.zeros(1, np.int8), np.zeros(1, np.int64), counts
    which, given, shares, slack = np.empty(period, np.int16), [0] * k, counts.tolist(), 2 * k - 2
    for n in range(1, period + 1):
        chosen, earliest = -1, np.inf
        for i in range(k):
            if slack * (shares[i] * n - given[i] * period) >= period:  # its share is 1/slack of a row ahead of it
                due = (slack * (given[i] + 1) - 1) / shares[i]  # when it would be 1 - 1/slack of a row ahead
                if due < earliest:
                    chosen, earliest = i, due
        which[n - 1] = chosen
        given[chosen] += 1
    nth = np.empty(period, np.int64)
    for i in range(k):
        nth[which == i] = np.arange(counts[i])
    return which, nth, counts


def period_counts(weights: Sequence[float]) -> np.ndarray:
    """Returns integers in proportion to `weights`, int [k], whose sum is the period of the interleaving.

    The period up to 2^20 with the least drift per row is taken, the shortest of equal ones: it is exact for decimal
    fractions and simple ratios. For other shares the drift is about a row per 10^9 with three sources, per 10^7 with
    eight.
    """
    shares = np.asarray(weights, np.float64) / np.sum(weights)
    periods = np.arange(len(shares), _LONGEST_PERIOD + 1)[:, None]
    counts = np.rint(shares * periods)
    drift = np.abs(shares - counts / periods).max(axis=1).round(15)  # float64 has no more digits
    drift[(counts < 1).any(axis=1) | (counts.sum(axis=1) != periods[:, 0])] = np.inf
    best = drift.argmin()
    if np.isinf(drift[best]):
        raise DataError(f"data.weights {tuple(weights)} differ by more than {_LONGEST_PERIOD:,} to 1; remove the "
                        "smallest source")
    return counts[best].astype(np.int64)
