import os
import time

import pytest

from dlm_jax.data.prepare import ordered_map
from dlm_jax.errors import DataError


def late(x: int) -> tuple[int, int]:
    time.sleep(0.02 * (x % 3 == 0))  # some results are ready before those ahead of them
    return x * x, os.getpid()


def refuse(x: int) -> int:
    if x == 5:
        raise DataError("five is refused")
    return x


def die(x: int) -> int:
    os._exit(1)


def test_results_come_in_order_from_other_processes():
    with ordered_map(late, 2) as run:
        results = list(run(range(30)))
    assert [value for value, _ in results] == [x * x for x in range(30)]
    assert os.getpid() not in {process for _, process in results}


def test_no_workers_is_here_and_lazy():
    with ordered_map(late, 0) as run:
        results = run(iter(range(3)))
        assert next(results) == (0, os.getpid())


def test_inputs_are_not_read_far_ahead():
    taken = []
    with ordered_map(abs, 2) as run:
        results = run(taken.append(x) or x for x in range(1000))
        next(results)
        assert len(taken) < 20


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_come_out_in_their_turn(workers):
    got = []
    with pytest.raises(DataError, match="five is refused"), ordered_map(refuse, workers) as run:
        got.extend(run(range(9)))
    assert got == [0, 1, 2, 3, 4]


def test_a_dead_worker_is_said_to_be_dead():
    with pytest.raises(DataError, match="tokenising process died.*run the same command again"), \
            ordered_map(die, 1) as run:
        list(run(range(3)))
