"""A pure function over a stream of inputs, in worker processes, with the results in order."""

import contextlib
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from dlm_jax.errors import DataError

_AHEAD = 3  # inputs a worker that are on their way at a time

_function: Callable[[Any], Any]  # in a worker: what it was started for


@contextlib.contextmanager
def ordered_map(function: Callable[[Any], Any], workers: int) -> Iterator[Callable[[Iterable], Iterator]]:
    """Gives `map(inputs)`, which yields `function(x)` for each input in order.

    Args:
      function: sent once to each worker, so it must be picklable, and so must inputs and results.
      workers: processes; 0: the work is done here.

    Raises:
      DataError: a worker died.
    """
    if workers == 0:
        yield lambda inputs: map(function, inputs)
        return
    # Not forked: the threads of JAX and of tokenizers do not survive a fork.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start, (function,))

    def in_order(inputs: Iterable) -> Iterator:
        waiting: deque = deque()
        for item in inputs:
            waiting.append(pool.submit(_call, item))
            if len(waiting) >= _AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    try:
        yield in_order
    except BrokenProcessPool as error:
        raise DataError("a tokenising process died, perhaps for lack of memory; run the same command again with fewer "
                        "workers, and it goes on from where it stopped") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start(function: Callable[[Any], Any]) -> None:
    global _function
    _function = function
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then stops the workers
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism


def _call(item: Any) -> Any:
    return _function(item)
