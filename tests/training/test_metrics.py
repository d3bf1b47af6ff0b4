"""Goodput, the metrics of steps and their records."""

import json
import math

import pytest

from dlm_jax.errors import TrainingError
from dlm_jax.training import metrics as metrics_module
from dlm_jax.training.config import LogConfig
from dlm_jax.training.metrics import GoodputClock, MetricAccumulator, MetricsLog, read_records, truncate_records

STEP = {"loss": 2.0, "grad_norm": 1.0, "learning_rate": 0.1}


@pytest.fixture
def time(monkeypatch):
    """A clock that is advanced by hand."""
    class Time:
        now = 100.0

        def monotonic(self):
            return self.now

    time = Time()
    monkeypatch.setattr(metrics_module, "time", time)
    return time


def test_goodput_counts_every_second_once(time):
    clock = GoodputClock()
    time.now += 5
    clock.switch("compilation")
    time.now += 7
    clock.switch("steps")
    for stall, computing, scored in ((1, 2, 10), (0, 9, 20), (3, 1, 30)):
        with clock.measure("data_stall"):
            time.now += stall
        time.now += computing
        clock.count_step(scored)
    with clock.measure("checkpointing"):
        time.now += 4
    assert clock.end_interval() == {"steps": 3, "scored": 60, "seconds": 16, "data_stall": 4, "slowest": 9}
    time.now += 2
    clock.count_step(5)
    assert clock.end_interval() == {"steps": 1, "scored": 5, "seconds": 2, "data_stall": 0, "slowest": 2}
    seconds = {category: value for category, value in clock.seconds().items() if value}
    assert seconds == {"startup": 5, "compilation": 7, "steps": 14, "data_stall": 4, "checkpointing": 4}
    assert clock.goodput() == pytest.approx(14 / 34)
    assert clock.line() == "steps 41.2%, compilation 20.6%, startup 14.7%, data_stall 11.8%, checkpointing 11.8%"


def test_goodput_adds_earlier_starts(time):
    clock = GoodputClock()
    clock.add({"steps": 10.0, "checkpointing": 2.0})
    clock.add({"lost_steps": 3.0})
    clock.switch("steps")
    time.now += 5
    clock.count_step(1)
    assert clock.end_interval()["seconds"] == 5 and clock.goodput() == 15 / 20
    assert clock.seconds()["lost_steps"] == 3


def test_accumulator_means_and_scheduled_values():
    accumulator = MetricAccumulator()
    accumulator.add(1, STEP)
    accumulator.add(2, {"loss": 4.0, "grad_norm": 1.0, "learning_rate": 0.2})
    assert accumulator.means() == {"loss": 3.0, "grad_norm": 1.0, "learning_rate": 0.2}


def test_accumulator_resumes_from_its_state():
    full, first = MetricAccumulator(), MetricAccumulator()
    for accumulator in (full, first):
        accumulator.add(1, {**STEP, "loss": 0.1})
    state = first.state()
    saved = json.dumps(state)
    first.add(2, STEP)
    assert json.dumps(state) == saved  # it is written while the next steps are added
    second = MetricAccumulator(**json.loads(saved))
    for accumulator in (full, second):
        accumulator.add(2, {**STEP, "loss": 0.7})
    assert second.means() == full.means()


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_nonfinite_metrics_raise(name):
    with pytest.raises(TrainingError, match=f"{name} .* step 7"):
        MetricAccumulator().add(7, {**STEP, name: float("nan")})


def test_skipped_steps_are_counted():
    accumulator = MetricAccumulator(skip=True)
    accumulator.add(1, STEP)
    accumulator.add(2, STEP | {"loss": math.nan})
    accumulator.add(3, STEP | {"grad_norm": math.inf})
    assert accumulator.means() == STEP | {"skipped": 2}
    accumulator = MetricAccumulator(skip=True, **json.loads(json.dumps(accumulator.state())))
    accumulator.add(4, STEP | {"loss": 4.0})
    assert accumulator.means() == STEP | {"loss": 3.0, "skipped": 2}
    accumulator.clear()
    assert accumulator.means() == {}


def test_many_consecutive_skipped_steps_raise():
    accumulator = MetricAccumulator(skip=True)
    for step in range(19):
        accumulator.add(step, STEP | {"loss": math.nan})
    accumulator.add(19, STEP)
    for step in range(20, 39):
        accumulator.add(step, STEP | {"loss": math.nan})
    with pytest.raises(TrainingError, match="step 39 .* 20 steps"):
        accumulator.add(39, STEP | {"loss": math.nan})


def test_records_past_the_checkpoint_and_cut_lines_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "kind": "train"}\n{"step": 5, "kind": "train"}\n{"step": 2, "ki')
    truncate_records(path, 4)
    assert read_records(tmp_path) == [{"step": 1, "kind": "train"}]


def test_log_writes_file_and_tensorboard(tmp_path):
    log = MetricsLog(tmp_path, LogConfig(tensorboard=True), {}, 0)
    log.write(3, "train", {"loss": 1.5})
    log.write(3, "sample", {"text": "once"})
    log.close()
    assert read_records(tmp_path) == [{"step": 3, "kind": "train", "loss": 1.5},
                                      {"step": 3, "kind": "sample", "text": "once"}]
    assert read_records(tmp_path, "sample") == [{"step": 3, "text": "once"}]
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"train/loss" in events.read_bytes() and b"once" in events.read_bytes()
