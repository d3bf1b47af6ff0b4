"""Which row of which source comes n-th: a pure function of n."""

import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import grain
import numpy as np
from grain.experimental import index_shuffle

from dlm_jax.data.rows import Rows, RowSource, gather, positions_of, segments_of, union_of_row_masks
from dlm_jax.diffusion import Batch
from dlm_jax.errors import DataError
from dlm_jax.random import uniform_by_index

_LONGEST_PERIOD = 1 << 20


class Mixture:
    """An endless sequence of rows of several sources, each gone through again and again in new orders.

    Among the first n rows, a source of weight w (a share of 1) has w n, to within one row.
    """

    def __init__(self, sources: Sequence[RowSource], weights: Sequence[float] = (), *, seed: int = 0,
                 shuffle: bool = True):
        """Args:
        sources: of rows of one length.
        weights: one for each source, in any unit; needed if there are several sources.
        seed: decides the order.
        shuffle: reorder a source each time through; else its rows come in order.
        """
        if len(weights or (1,)) != len(sources):
            raise DataError(f"{len(sources)} sources to mix need as many weights, not {len(weights)}")
        self.sources, self.seed, self.shuffle = sources, seed, shuffle
        self.row_masks = union_of_row_masks(sources)
        self._which, self._nth, self._counts = schedule(tuple(weights or (1.0,)))

    def __getitem__(self, examples: np.ndarray) -> Rows:
        """The rows at these places of the sequence."""
        which, nth = self.locate(examples)
        indices = np.empty_like(nth)
        for i, source in enumerate(self.sources):
            indices[which == i] = self._order(i, nth[which == i], len(source))
        return gather(self.sources, which, indices, self.row_masks)

    def locate(self, examples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of each place: its source, and how many rows that source has given before."""
        period, offset = np.divmod(examples, len(self._which))
        which = self._which[offset]
        return which, period * self._counts[which] + self._nth[offset]

    def _order(self, source: int, nth: np.ndarray, count: int) -> np.ndarray:
        if not self.shuffle:
            return nth % count
        # The first source's order does not depend on whether there are others.
        return np.array([shuffled(n, count, self.seed, source) for n in nth.tolist()], np.int64)


def shuffled(n: int, count: int, seed: int, source: int = 0) -> int:
    """Element n of the sequence that runs through 0..count-1 again and again, each time in a new order."""
    epoch, index = divmod(n, count)
    return index_shuffle(index, max_index=count - 1, seed=_epoch_seed(seed, epoch, source), rounds=4)


@functools.lru_cache(maxsize=256)
def _epoch_seed(seed: int, epoch: int, source: int) -> int:
    text = f"{seed},{epoch}" + (f",{source}" if source else "")
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big")


@functools.lru_cache(maxsize=4)
def schedule(weights: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One period of the interleaving of sources with these weights.

    Each place goes to the source whose next row is due first, among those whose share has grown enough to have one
    (R. Tijdeman, The chairman assignment problem, 1980): no prefix then deviates by more than 1 - 1/(2k - 2) rows
    from k sources' shares.

    Returns:
      For each place of the period the source [period] and how many places it had before [period]; and the places
      of each source in a period [k].
    """
    counts = period_of(weights)
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


def period_of(weights: Sequence[float]) -> np.ndarray:
    """Whole numbers in the proportion of `weights`, int [k]: the smallest exact ones, else the closest.

    Shares that are decimal fractions or simple ratios have an exact period. For others the period up to 2^20 with
    the least drift is taken: with three sources a drift of about a row in a billion, with eight one in ten million.
    """
    shares = np.asarray(weights, np.float64) / np.sum(weights)
    if len(shares) == 1:
        return np.ones(1, np.int64)
    periods = np.arange(len(shares), _LONGEST_PERIOD + 1)[:, None]
    counts = np.rint(shares * periods)
    error = np.abs(shares * periods - counts).max(axis=1)
    error[(counts < 1).any(axis=1) | (counts.sum(axis=1) != periods[:, 0])] = np.inf
    if np.isinf(error).all():
        raise DataError(f"data.weights {tuple(weights)} differ by more than {_LONGEST_PERIOD:,} to 1; leave the "
                        "smallest source out")
    exact = np.flatnonzero(error < 1e-9)
    best = exact[0] if len(exact) else np.argmin(error / periods[:, 0])
    return counts[best].astype(np.int64)


# ---- Batches as a function of the step.


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
        noisable_mask = np.ones(drawn.tokens.shape, bool) if drawn.noisable_mask is None else drawn.noisable_mask.copy()
        noisable_mask[:, 0] = False
        positions = segment_ids = None
        if drawn.starts is not None:
            positions, segment_ids = positions_of(drawn.starts), segments_of(drawn.starts)
            noisable_mask &= positions > 0  # a segment's first position is its context
        return Batch(tokens=drawn.tokens.astype(np.int32), noisable_mask=noisable_mask, example_index=examples.astype(np.uint32),
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
    rows = rows.with_row_masks(("starts", "noisable_mask"))
    index = np.arange(rows.length)
    return Rows(rows.tokens, np.where(index < lengths[:, None], rows.starts, index == lengths[:, None]),
                rows.noisable_mask & (index < lengths[:, None]))


def random_lengths(examples: np.ndarray, share: float, length: int, seed: int) -> np.ndarray:
    """For a `share` of the examples a length drawn from 2..length, for the others `length`; int [examples]."""
    chosen, drawn = (uniform_by_index(examples, seed, stream) for stream in range(2))
    return np.where(chosen < share, 2 + (drawn * (length - 1)).astype(np.int64), length)
