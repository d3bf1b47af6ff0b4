"""Batches as a function of the step."""

import hashlib
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, Self

import numpy as np
from grain.experimental import index_shuffle

from dlm_jax.data.batch import Batch
from dlm_jax.data.packing import positions_of
from dlm_jax.data.rows import Rows
from dlm_jax.errors import DataError


def shuffled(index: int, count: int, seed: int) -> int:
    """Element `index` of the sequence that runs through 0..count-1 again and again, each in a new order."""
    epoch, index = divmod(index, count)
    mixed = hashlib.blake2b(f"{seed},{epoch}".encode(), digest_size=4).digest()
    return index_shuffle(index, max_index=count - 1, seed=int.from_bytes(mixed, "big"), rounds=4)


class Loader:
    """Gives the batch of any step, the same whenever and wherever it is asked for."""

    def __init__(self, rows: Rows, batch_size: int, *, seed: int = 0, shuffle: bool = True):
        """Args:
        rows: what to draw from; once through is an epoch, and batches run on from one to the next.
        batch_size: rows in the global batch.
        seed: decides the order.
        shuffle: reorder in every epoch; else the rows come in order.
        """
        if not len(rows):
            raise DataError("there is no row to draw batches from")
        self.rows, self.batch_size, self.seed, self.shuffle = rows, batch_size, seed, shuffle

    def batch(self, step: int, rows: slice | None = None) -> Batch:
        """The batch of a step as NumPy arrays, or the part of it at `rows` of the global batch."""
        examples = np.arange(self.batch_size, dtype=np.int64)[rows or slice(None)] + step * self.batch_size
        count = len(self.rows)
        order = [shuffled(int(i), count, self.seed) for i in examples] if self.shuffle else examples % count
        drawn = self.rows[np.asarray(order)]
        maskable = np.ones(drawn.tokens.shape, bool)
        maskable[:, 0] = False
        positions = None
        if drawn.segment_ids is not None:
            positions = positions_of(drawn.segment_ids)
            maskable &= positions > 0  # a segment's first position is its context
        return Batch(
            tokens=np.asarray(drawn.tokens, np.int32),
            maskable=maskable,
            example_index=examples.astype(np.uint32),
            segment_ids=drawn.segment_ids,
            positions=positions,
        )

    def prefetch(
        self,
        start_step: int = 0,
        place: Callable[[Batch], Any] = lambda batch: batch,
        *,
        rows: slice | None = None,
        depth: int = 2,
    ) -> "Prefetcher":
        """Iterates `place(batch)` from `start_step` on, made ahead by a thread; close it, or use `with`."""
        return Prefetcher(lambda step: place(self.batch(step, rows)), start_step, depth)


class Prefetcher:
    """Iterates `make(start), make(start + 1), ...`, made ahead by a thread; its exceptions come out here."""

    def __init__(self, make: Callable[[int], Any], start: int = 0, depth: int = 2):
        self._ready: queue.Queue = queue.Queue(depth)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(make, start), daemon=True, name="prefetch")
        self._thread.start()

    def _work(self, make: Callable[[int], Any], step: int) -> None:
        while not self._closed.is_set():
            try:
                item = (make(step), None)
            except BaseException as error:  # handed to the consumer, whatever it is
                item = (None, error)
            self._put(item)
            if item[1] is not None:
                return
            step += 1

    def _put(self, item: tuple) -> None:
        while not self._closed.is_set():
            try:
                return self._ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._closed.is_set():
            raise StopIteration
        value, error = self._ready.get()
        if error is not None:
            self.close()
            raise error
        return value

    def close(self) -> None:
        """Stops the thread and drops what it has made; harmless when repeated."""
        self._closed.set()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()
