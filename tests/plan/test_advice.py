"""Largest batches and advice: on GPUs, which need no compiler, and once on a TPU slice."""

import dataclasses
import importlib.util

import pytest

from dlm_jax.plan import advise, gpu_target, largest_batch, make_plan, tpu_target
from dlm_jax.plan.advice import changes, micro_batch_counts, with_settings
from tests.plan.test_memory import changed

with_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")


def small_gpu(config, base, gib: float):
    """Two GPUs with little memory."""
    target = gpu_target(config, base.config, "h100:2")
    return dataclasses.replace(target, chip=dataclasses.replace(target.chip, memory=gib))


def test_the_largest_batch_fits_and_the_next_does_not(config, base):
    target = small_gpu(config, base, 0.05)
    notes = []
    largest = largest_batch(config, base, target, make_plan(config, base, target), notes.append)
    assert largest.refused == largest.batch_size + 4  # two micro-batches on two devices
    assert largest.needed <= 0.05 and len(notes) == largest.trials - 1
    for size, fits in ((largest.batch_size, True), (largest.refused, False)):
        assert make_plan(changed(config, data={"batch_size": size}), base, target).memory.fits is fits


def test_advice_ends_with_what_fits_and_shows_what_does_not(config, base):
    config = changed(config, data={"batch_size": 4096})
    target = small_gpu(config, base, 0.1)
    plan = make_plan(config, base, target)
    assert not plan.memory.fits and plan.time is None and plan.least_chips == 1
    trials = advise(config, base, target, plan, lambda note: None)
    assert [trial.memory.fits for trial in trials] == [False] * (len(trials) - 1) + [True]
    again = make_plan(with_settings(config, trials[-1].settings), base, target)
    assert again.memory == trials[-1].memory and again.time.seconds > 0


def test_where_the_state_alone_is_too_large_only_what_shrinks_it_is_tried(config, base):
    target = small_gpu(config, base, 0.004)
    plan = make_plan(config, base, target)
    assert plan.least_chips > plan.num_chips
    trial, = advise(config, base, target, plan, lambda note: None)
    assert trial.settings["model.param_dtype"] == "bfloat16" and trial.settings["model.remat"] == "full"


def test_micro_batches_divide_the_batch(config):
    config = changed(config, data={"batch_size": 960}, optimizer={"accumulate_steps": 4})
    assert micro_batch_counts(config, 16) == [20, 60]
    assert micro_batch_counts(config, 240) == []


@with_libtpu
def test_what_lies_in_host_memory_takes_none_of_the_chips(config, base):
    target = tpu_target(config, base.config, "v5e:2x2")
    settings = list(changes(changed(config, data={"batch_size": 64}), target))
    assert settings[-2:] == [{"optimizer.accumulate_steps": 16, "model.remat": "full", "optimizer.offload": True},
                             {"optimizer.accumulate_steps": 16, "model.remat": "full", "model.param_dtype": "bfloat16"}]
    plan, offloaded = (make_plan(with_settings(config, {"optimizer.offload": where}), base, target)
                       for where in (False, True))
    assert offloaded.state == pytest.approx(plan.state / 3, rel=0.01) and offloaded.parts is None
    assert offloaded.memory.arguments < plan.memory.arguments
    assert offloaded.memory.host > 0 == plan.memory.host


@with_libtpu
def test_a_tpu_slice_is_compiled_for(config, base):
    target = tpu_target(config, base.config, "v5e:2x2")
    plan = make_plan(config, base, target)
    assert plan.is_compiled and plan.memory.fits and plan.attention == "tpu" and plan.compile_seconds > 0
    assert plan.mesh["fsdp"] == plan.num_chips == 4 and plan.rows == 4
    assert plan.state < plan.memory.arguments < 2 * plan.state  # TPUs pad what is narrower than 128
    assert plan.sent["all-gather"]["count"] >= 2 and plan.time.floor == max(plan.time.limits.values())
    refused = make_plan(changed(config, data={"batch_size": 1 << 20}), base, target)
    assert not refused.memory.fits and refused.memory.limit == target.chip.memory and refused.time is None
