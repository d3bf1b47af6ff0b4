"""Plans, largest batches and suggestions: on GPUs, which need no compiler, and on one TPU slice."""

import dataclasses
import math

import pytest

from dlm_jax.plan import gpu_target, largest_batch, make_plan, suggest, tpu_target
from dlm_jax.plan.report import changes, largest_that_fits, micro_batch_counts, with_settings
from tests.plan.conftest import needs_libtpu, with_values

LIMIT = 15.75


def small_gpus(config, base, gib: float):
    target = gpu_target(config, base.config, "h100:2")
    return dataclasses.replace(target, chip=dataclasses.replace(target.chip, memory=gib))


def test_largest_batch(config, base):
    target, lines = small_gpus(config, base, 0.05), []
    largest = largest_batch(config, base, target, make_plan(config, base, target), lines.append)
    assert largest.refused == largest.batch_size + 4  # two micro-batches on two devices
    assert largest.needed <= 0.05 and len(lines) == largest.trials - 1
    for size, fits in ((largest.batch_size, True), (largest.refused, False)):
        assert make_plan(with_values(config, data={"batch_size": size}), base, target).memory.fits is fits


def test_suggestions_end_with_what_fits(config, base):
    config = with_values(config, data={"batch_size": 4096})
    target = small_gpus(config, base, 0.1)
    plan = make_plan(config, base, target)
    assert not plan.memory.fits and plan.time is None and plan.least_chips == 1
    trials = suggest(config, base, target, plan, lambda line: None)
    assert [trial.memory.fits for trial in trials] == [False] * (len(trials) - 1) + [True]
    last = make_plan(with_settings(config, trials[-1].settings), base, target)
    assert last.memory == trials[-1].memory and last.time.seconds > 0


def test_suggestions_shrink_a_state_that_is_too_large(config, base):
    target = small_gpus(config, base, 0.004)
    plan = make_plan(config, base, target)
    assert plan.least_chips > plan.num_chips
    trial, = suggest(config, base, target, plan, lambda line: None)
    assert trial.settings["model.param_dtype"] == "bfloat16" and trial.settings["model.remat"] == "full"


def test_micro_batches_divide_the_batch(config):
    config = with_values(config, data={"batch_size": 960}, optimizer={"accumulate_steps": 4})
    assert micro_batch_counts(config, 16) == [20, 60]
    assert micro_batch_counts(config, 240) == []


@needs_libtpu
def test_compiled_plan(config, base):
    target = tpu_target(config, base.config, "v5e:2x2")
    plan = make_plan(config, base, target)
    assert plan.is_compiled and plan.memory.fits and plan.attention == "tpu" and plan.compile_seconds > 0
    assert plan.mesh["fsdp"] == plan.num_chips == 4 and plan.rows == 4
    assert plan.state < plan.memory.arguments < 2 * plan.state  # TPUs pad axes that are narrower than 128
    assert plan.sent["all-gather"]["count"] >= 2 and plan.time.floor == max(plan.time.limits.values())
    refused = make_plan(with_values(config, data={"batch_size": 1 << 20}), base, target)
    assert not refused.memory.fits and refused.memory.limit == target.chip.memory and refused.time is None

    settings = list(changes(with_values(config, data={"batch_size": 64}), target))
    assert settings[-2:] == [{"optimizer.accumulate_steps": 16, "model.remat": "full", "optimizer.offload": True},
                             {"optimizer.accumulate_steps": 16, "model.remat": "full", "model.param_dtype": "bfloat16"}]
    offloaded = make_plan(with_settings(config, {"optimizer.offload": True}), base, target)
    assert offloaded.state == pytest.approx(plan.state / 3, rel=0.01) and offloaded.memory_estimate is None
    assert offloaded.memory.arguments < plan.memory.arguments
    assert offloaded.memory.host > 0 == plan.memory.host


@pytest.mark.parametrize("start", [1, 3, 100])
@pytest.mark.parametrize("slope", [0.01, 0.3, 5.0])
@pytest.mark.parametrize("offset", [0.1, 7.0, 15.2, 16.0])
def test_search_finds_the_largest(offset, slope, start):
    tried = []

    def needs(rows: int) -> float | None:
        tried.append(rows)
        return offset + slope * rows if offset + slope * rows <= LIMIT else None

    largest = max(math.floor((LIMIT - offset) / slope + 1e-9), 0)
    assert largest_that_fits(needs, LIMIT, start, max_trials=30) == (largest, largest + 1)
    assert len(tried) == len(set(tried)) <= 12  # each trial is a compilation


def test_search_of_a_line_or_a_jump():
    line = lambda rows: 3 + 0.5 * rows if 3 + 0.5 * rows <= LIMIT else None  # noqa: E731
    assert largest_that_fits(line, LIMIT, 2, max_trials=4) == (25, 26)
    assert largest_that_fits(line, LIMIT, 2, max_trials=2) == (4, None)
    assert largest_that_fits(lambda rows: 0.1 * rows if rows <= 11 else None, LIMIT, 1) == (11, 12)
