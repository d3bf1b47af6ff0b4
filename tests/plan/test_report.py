"""Plans and suggestions: on GPUs, which need no compiler, and on one TPU slice."""

import dataclasses

import pytest

from dlm_jax.parallel.chips import GIB
from dlm_jax.plan import gpu_target, make_plan, suggest, tpu_target
from dlm_jax.plan.compile import abstract_state, device_bytes
from dlm_jax.plan.report import changes, micro_batch_counts, with_settings
from tests.plan.conftest import needs_libtpu, with_values


def small_gpus(config, base, gib: float):
    target = gpu_target(config, base.config, "h100:2")
    return dataclasses.replace(target, chip=dataclasses.replace(target.chip, memory=gib))


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
    assert plan.is_compiled and plan.memory.fits and plan.attention == "tpu"
    assert plan.mesh["fsdp"] == plan.num_chips == 4
    state, memory = device_bytes(abstract_state(config, base, target.mesh)) / GIB, plan.memory.breakdown
    assert state < memory["arguments"] < 2 * state  # TPUs pad axes that are narrower than 128
    assert plan.sent["all-gather"]["count"] >= 2 and plan.time.floor == max(plan.time.limits.values())
    refused = make_plan(with_values(config, data={"batch_size": 1 << 20}), base, target)
    assert not refused.memory.fits and refused.memory.limit == target.chip.memory and refused.time is None

    settings = list(changes(with_values(config, data={"batch_size": 64}), target))
    assert settings[-2:] == [{"optimizer.accumulate_steps": 16, "model.remat": "full", "optimizer.offload": True},
                             {"optimizer.accumulate_steps": 16, "model.remat": "full", "model.param_dtype": "bfloat16"}]
    offloads = with_settings(config, {"optimizer.offload": True})
    assert device_bytes(abstract_state(offloads, base, target.mesh)) / GIB == pytest.approx(state / 3, rel=0.01)
    offloaded = make_plan(offloads, base, target).memory.breakdown
    assert offloaded["arguments"] < memory["arguments"] and offloaded["host"] > 0 == memory["host"]
