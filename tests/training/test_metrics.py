import json
import math

import pytest

from dlm_jax.errors import TrainingError
from dlm_jax.training.config import LogConfig
from dlm_jax.training.metrics import MetricAccumulator, MetricsLog, read_records, truncate_records

STEP = {"loss": 2.0, "grad_norm": 1.0, "learning_rate": 0.1}


def test_a_window_means_what_varies_and_keeps_what_is_scheduled():
    accumulator = MetricAccumulator()
    accumulator.add(1, STEP)
    accumulator.add(2, {"loss": 4.0, "grad_norm": 1.0, "learning_rate": 0.2})
    assert accumulator.means() == {"loss": 3.0, "grad_norm": 1.0, "learning_rate": 0.2}


def test_a_window_goes_on_from_its_saved_state():
    whole, first = MetricAccumulator(), MetricAccumulator()
    for accumulator in (whole, first):
        accumulator.add(1, {**STEP, "loss": 0.1})
    second = MetricAccumulator(**json.loads(json.dumps(first.state())))
    for accumulator in (whole, second):
        accumulator.add(2, {**STEP, "loss": 0.7})
    assert second.means() == whole.means()


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_what_is_not_finite_is_an_error_that_names_the_step(name):
    with pytest.raises(TrainingError, match=f"{name} is nan at step 7"):
        MetricAccumulator().add(7, {**STEP, name: float("nan")})


def test_records_past_the_checkpoint_and_cut_lines_go(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "kind": "train"}\n{"step": 5, "kind": "train"}\n{"step": 2, "ki')
    truncate_records(path, 4)
    assert read_records(tmp_path) == [{"step": 1, "kind": "train"}]


def test_every_record_reaches_file_and_board(tmp_path):
    log = MetricsLog(tmp_path, LogConfig(tensorboard=True), {}, 0)
    log.write(3, "train", {"loss": 1.5})
    log.write(3, "sample", {"text": "once"})
    log.close()
    assert read_records(tmp_path) == [{"step": 3, "kind": "train", "loss": 1.5},
                                      {"step": 3, "kind": "sample", "text": "once"}]
    assert read_records(tmp_path, "sample") == [{"step": 3, "text": "once"}]
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"train/loss" in events.read_bytes() and b"once" in events.read_bytes()


def test_skipped_steps_are_counted_and_leave_the_means_alone():
    good = {"loss": 2.0, "grad_norm": 1.0, "learning_rate": 0.1}
    accumulator = MetricAccumulator(skip=True)
    accumulator.add(1, good)
    accumulator.add(2, good | {"loss": math.nan})
    accumulator.add(3, good | {"grad_norm": math.inf})
    assert accumulator.means() == good | {"skipped": 2}
    accumulator = MetricAccumulator(skip=True, **json.loads(json.dumps(accumulator.state())))
    accumulator.add(4, good | {"loss": 4.0})
    assert accumulator.means() == good | {"loss": 3.0, "skipped": 2}
    accumulator.clear()
    assert accumulator.means() == {}


def test_many_bad_steps_in_a_row_are_no_accident():
    accumulator = MetricAccumulator(skip=True)
    for step in range(19):
        accumulator.add(step, {"loss": math.nan, "grad_norm": 1.0})
    accumulator.add(19, {"loss": 1.0, "grad_norm": 1.0})
    for step in range(20, 39):
        accumulator.add(step, {"loss": math.nan, "grad_norm": 1.0})
    with pytest.raises(TrainingError, match="loss is nan at step 39 and has not been finite for 20 steps"):
        accumulator.add(39, {"loss": math.nan, "grad_norm": 1.0})


def test_a_windows_state_does_not_change_while_it_is_written():
    accumulator = MetricAccumulator()
    accumulator.add(0, {"loss": 1.0, "grad_norm": 1.0, "learning_rate": 0.1})
    state = accumulator.state()
    accumulator.add(1, {"loss": 2.0, "grad_norm": 1.0, "learning_rate": 0.2})
    assert state["sums"]["loss"] == 1.0 and state["scheduled"] == {"learning_rate": 0.1} and state["steps"] == 1
