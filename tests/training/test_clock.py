import pytest

from dlm_jax.training import metrics as module
from dlm_jax.training.metrics import Clock


@pytest.fixture
def time(monkeypatch):
    """A clock that goes when it is told to."""
    class Time:
        now = 100.0

        def monotonic(self):
            return self.now

    time = Time()
    monkeypatch.setattr(module, "time", time)
    return time


def test_every_second_counts_once(time):
    clock = Clock()
    time.now += 5
    clock.switch("compiling")
    time.now += 7
    clock.switch("steps")
    for waiting, computing, scored in ((1, 2, 10), (0, 9, 20), (3, 1, 30)):
        with clock.doing("data"):
            time.now += waiting
        time.now += computing
        clock.count(scored)
    with clock.doing("saving"):
        time.now += 4
    assert clock.lap() == {"steps": 3, "scored": 60, "seconds": 16, "waiting": 4, "slowest": 9}
    time.now += 2
    clock.count(5)
    assert clock.lap() == {"steps": 1, "scored": 5, "seconds": 2, "waiting": 0, "slowest": 2}
    spent = {kind: seconds for kind, seconds in clock.state().items() if seconds}
    assert spent == {"start": 5, "compiling": 7, "steps": 14, "data": 4, "saving": 4}
    assert clock.goodput() == pytest.approx(14 / 34)
    assert clock.line() == "steps 41.2%, compiling 20.6%, start 14.7%, saving 11.8%, data 11.8%"


def test_starts_before_are_added_and_change_no_lap(time):
    clock = Clock()
    clock.add({"steps": 10.0, "saving": 2.0})
    clock.add({"lost": 3.0})
    clock.switch("steps")
    time.now += 5
    clock.count(1)
    assert clock.lap()["seconds"] == 5 and clock.goodput() == 15 / 20
    assert clock.state()["lost"] == 3
