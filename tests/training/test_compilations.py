"""What a run compiles, and when it waits for the device."""

import contextlib
from collections.abc import Iterator

import jax
import pytest

from dlm_jax.training import loop, setup, train
from dlm_jax.training.step import make_train_step
from tests.training.conftest import changed

COMPILED = "/jax/core/compile/backend_compile_duration"


@contextlib.contextmanager
def compilations(events: list[tuple[str, object]]) -> Iterator[None]:
    """Appends ("compile", name of the function) whenever XLA is asked for a program."""
    def listen(event: str, duration: float, **about: object) -> None:
        if event == COMPILED:
            events.append(("compile", about.get("fun_name")))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture(scope="module")
def events(config, tmp_path_factory):
    """What happens, in order, in six steps with annealing, micro-batches, validation, logging and checkpoints."""
    found: list[tuple[str, object]] = []

    def make_watched(*args, **kwargs):
        step, number = make_train_step(*args, **kwargs), iter(range(1, 100))

        def watched(state, batch):
            found.append(("begin", next(number)))
            return step(state, batch)

        return watched

    log_metrics = loop.log_metrics
    run = changed(changed(config, "num_steps", 6), "log.every", 2)
    run = changed(changed(run, "validation.every", 3), "checkpoint.every", 3)
    with pytest.MonkeyPatch.context() as patch, compilations(found):
        patch.setattr(setup, "make_train_step", make_watched)
        patch.setattr(loop, "log_metrics", lambda run, step, metrics: (
            found.append(("fetch", step)), log_metrics(run, step, metrics)))
        train(run, tmp_path_factory.mktemp("runs") / "watched")
    return found


def test_nothing_compiles_after_the_first_step(events):
    compiled = [name for event, name in events if event == "compile"]
    assert compiled.count("jit(train_step)") == compiled.count("jit(eval_step)") == 1
    second, fourth = events.index(("begin", 2)), events.index(("begin", 4))
    # Orbax slices the state by device when it first saves, after step 3.
    assert {name for event, name in events[second:fourth] if event == "compile"} <= {"jit(slice)"}
    assert [name for event, name in events[fourth:] if event == "compile"] == []


def test_metrics_are_fetched_while_the_next_step_runs(events):
    """Except after steps 3 and 6, after which the run validates and saves."""
    order = [f"{event} {number}" for event, number in events if event != "compile"]
    assert order == ["begin 1", "begin 2", "fetch 1", "begin 3", "fetch 2", "fetch 3",
                     "begin 4", "begin 5", "fetch 4", "begin 6", "fetch 5", "fetch 6"]
