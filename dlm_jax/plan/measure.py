"""What one setting needs on one target: compiled for a TPU, added up for GPUs."""

import dataclasses
import math

from dlm_jax.parallel import num_batch_shards
from dlm_jax.parallel.chips import GIB
from dlm_jax.plan.base import Base
from dlm_jax.plan.collectives import by_kind, collectives
from dlm_jax.plan.compiled import Memory, compile_step
from dlm_jax.plan.memory import StepMemory, add_up, has_analytic_estimate, placed_bytes
from dlm_jax.plan.program import planned_state, trace_step
from dlm_jax.plan.roofline import Estimate, Flops, estimate, step_flops
from dlm_jax.plan.targets import Target
from dlm_jax.plan.traffic import compiled_traffic, described_traffic, memory_traffic
from dlm_jax.training.config import TrainConfig


@dataclasses.dataclass(frozen=True)
class Plan:
    """A step of a recipe on some devices. Figures are of one chip (JAX device) unless they say otherwise.

    Attributes:
      is_compiled: whether the compiler has said so; else memory is added up and fitting is an estimate.
      rows: of a micro-batch on a part of the mesh that holds rows of its own.
      memory: needed, and granted.
      parts: of the memory, added up; beside what the compiler says, to compare. None where the mesh splits more than
        the batch, or where the host's memory holds a part.
      state: GiB of parameters, moments and average, as they are placed.
      least_chips: so many, sharing the storage of the state and its gradients, could hold them and nothing else.
      sent: by kind of collective `{"count": a step, "bytes": sent in a step}`; None where not compiled.
      unbounded: collectives in loops whose number of trips depends on the data, which were counted for one trip.
      flops: of a step, over all chips.
      time: estimated; None of a step that does not fit.
      compile_seconds: None where not compiled.
    """

    target: str
    chip: str
    num_chips: int
    mesh: dict[str, int]
    attention: str
    attention_reason: str | None
    batch_size: int
    length: int
    micro_batches: int
    rows: int
    is_compiled: bool
    memory: Memory
    parts: StepMemory | None
    state: float
    least_chips: int
    sent: dict[str, dict[str, float]] | None
    unbounded: int
    flops: Flops
    time: Estimate | None
    compile_seconds: float | None


def make_plan(config: TrainConfig, base: Base, target: Target) -> Plan:
    """Compiles the step for `target`, or adds up what it needs, and estimates its time.

    Raises:
      CompileError: it cannot be compiled, for another reason than memory.
    """
    flops = step_flops(config, base.config, target.attention, base.new_mask_token)
    layout, shape = planned_state(config, base, target.mesh), target.mesh.shape
    held = placed_bytes(layout) + placed_bytes(layout.params)  # the gradients are as large as the parameters
    sent, unbounded, seconds, traffic = None, 0, None, None
    parts = add_up(config, base, target.mesh, target.attention) if has_analytic_estimate(config, shape) else None
    if target.is_compiled_for:
        programs = trace_step(config, base, target.mesh, target.attention)
        # An average of the parameters is no argument of the first of two programs.
        beside = placed_bytes(layout.ema) / GIB if len(programs) > 1 else 0.0
        compiled = compile_step(programs, target.chip.memory, beside)
        memory, seconds = compiled.memory, compiled.seconds
        if memory.fits:
            found = [one for hlo in compiled.hlo for one in collectives(hlo, target.mesh.size, target.num_slices)]
            sent, unbounded = by_kind(found), sum(not c.is_bounded for c in found)
            moved = memory_traffic(config, base, target, memory.arguments, memory.temporary)
            traffic = compiled_traffic(found, moved)
    else:
        memory = Memory(parts.total, target.chip.memory, parts.total <= target.chip.memory)
        traffic = described_traffic(config, base, target, parts)
    return Plan(
        target=target.name, chip=target.chip.name, num_chips=target.mesh.size, mesh=dict(shape),
        attention=target.attention, attention_reason=target.reason, batch_size=config.data.batch_size,
        length=config.data.length, micro_batches=config.optimizer.accumulate_steps,
        rows=config.data.batch_size // (num_batch_shards(target.mesh) * config.optimizer.accumulate_steps),
        is_compiled=target.is_compiled_for, memory=memory, parts=parts, state=placed_bytes(layout) / GIB,
        least_chips=math.ceil(held * shape["fsdp"] * shape["context"] * shape["tensor"] / GIB / target.chip.memory),
        sent=sent, unbounded=unbounded, flops=flops, compile_seconds=seconds,
        time=estimate(config, flops, traffic, target.chip, target.mesh.size) if memory.fits and traffic else None)
