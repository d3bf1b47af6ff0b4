import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from dlm_jax.parallel.chips import CHIPS
from dlm_jax.plan.compiled import CompileError, compile_step, exhausted
from dlm_jax.plan.topology import read_topology, tpu_devices

with_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")


@pytest.mark.parametrize(("message", "needed", "limit"), [
    ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (352.22G) exceeds "
     "available HBM (15.75G).", 352.22, 15.75),
    ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (2.00T) exceeds "
     "available HBM (15.75G).", 2048, 15.75),
    ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 18.30G of "
     "15.75G hbm. Exceeded hbm capacity by 2.55G.\n\nTotal hbm usage >= 18.55G:", 18.30, 15.75),
    ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 512.5M of 256.0M hbm.", 512.5 / 1024, 0.25),
])
def test_a_refusal_for_want_of_memory_gives_its_numbers(message, needed, limit):
    memory = exhausted(message)
    assert (memory.needed, memory.limit, memory.fits) == (pytest.approx(needed), pytest.approx(limit), False)


@pytest.mark.parametrize("message", [
    "INTERNAL: Mosaic failed to compile TPU kernel", "INVALID_ARGUMENT: Used 18.30G of 15.75G hbm",
    "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 18.30M of 16.00M vmem."])
def test_other_refusals_are_not_taken_for_it(message):
    assert exhausted(message) is None


def traced(device: jax.Device, gib: int, function=jnp.sin) -> list[jax.stages.Traced]:
    shape = jax.ShapeDtypeStruct((gib, 1024, 1024, 256), jnp.float32, sharding=SingleDeviceSharding(device))
    return [jax.jit(function).trace(shape)]


@with_libtpu
@pytest.mark.parametrize("name", ["v2:2x2", "v3:2x2", "v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_the_table_has_the_memory_that_the_compiler_grants(name):
    chip = next(chip for chip in CHIPS if name.startswith(chip.name))
    device = tpu_devices(read_topology(name))[0]
    result = compile_step(traced(device, 200), chip.memory)
    assert not result.memory.fits and result.memory.limit == chip.memory and not result.hlo
    result = compile_step(traced(device, 2), chip.memory)
    assert result.memory.fits and result.memory.needed == pytest.approx(4, rel=0.01) and "ENTRY" in result.hlo[0]
    assert result.memory.arguments == pytest.approx(2)
    both = compile_step([*traced(device, 1), *traced(device, 2)], chip.memory)
    assert both.memory == result.memory and len(both.hlo) == 2
    crowded = compile_step(traced(device, 1), chip.memory, beside=chip.memory - 1)
    assert not crowded.memory.fits and crowded.memory.needed == pytest.approx(chip.memory + 1, rel=0.01)


@with_libtpu
def test_what_lies_in_host_memory_is_not_the_chips():
    device = tpu_devices(read_topology("v5e:2x2"))[0]
    here, there = (SingleDeviceSharding(device, memory_kind=kind) for kind in ("device", "pinned_host"))
    small, large = (jax.ShapeDtypeStruct((gib, 1024, 1024, 256), jnp.float32, sharding=place)
                    for gib, place in ((1, here), (20, there)))
    step = jax.jit(lambda x, y: (jnp.sin(x), y), donate_argnums=(0, 1), out_shardings=(here, there))
    memory = compile_step([step.trace(small, large)], 15.75).memory
    assert memory.fits and memory.needed == pytest.approx(1, rel=0.01) and memory.host == 20


def test_what_cannot_be_compiled_is_one_sentence(monkeypatch):
    def fail(self):
        raise jax.errors.JaxRuntimeError("INTERNAL: Mosaic failed\nto compile")

    monkeypatch.setattr(jax.stages.Traced, "lower", fail)
    with pytest.raises(CompileError, match="the step cannot be compiled: INTERNAL: Mosaic failed to compile$"):
        compile_step(traced(jax.devices()[0], 1), 16)
