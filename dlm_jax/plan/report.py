"""The plan of a recipe on some devices: what it needs, what would fit instead, and both as lines of text."""

import dataclasses
import math
from collections.abc import Callable, Iterator

from dlm_jax.models import ModelConfig
from dlm_jax.parallel import num_batch_shards
from dlm_jax.parallel.chips import GIB
from dlm_jax.plan.collectives import by_kind, collectives
from dlm_jax.plan.compile import Base, Memory, abstract_state, compile_step, device_bytes, trace_step
from dlm_jax.plan.estimate import (
    Estimate,
    Flops,
    estimate_memory,
    estimate_time,
    gpu_sent,
    memory_traffic,
    step_flops,
)
from dlm_jax.plan.topology import Target
from dlm_jax.training.config import TrainConfig
from dlm_jax.training.flops import count_active, count_params


@dataclasses.dataclass(frozen=True)
class Plan:
    """A step of a recipe on some devices; figures are per chip (JAX device) unless stated otherwise.

    Attributes:
      is_compiled: whether the compiler has decided; otherwise memory, and so fitting, is an estimate.
      least_chips: chips that could hold the state and its gradients, fully sharded, and nothing else.
      sent: by kind of collective `{"count": per step, "bytes": sent per step}`; None if not compiled.
      flops: of a step over all chips.
      time: None for a step that does not fit.
    """

    target: str
    num_chips: int
    mesh: dict[str, int]
    attention: str
    attention_reason: str | None
    is_compiled: bool
    memory: Memory
    least_chips: int
    sent: dict[str, dict[str, float]] | None
    flops: Flops
    time: Estimate | None


@dataclasses.dataclass(frozen=True)
class Trial:
    """The memory of a recipe with changed settings; `seconds` per step, estimated, if it fits."""

    settings: dict[str, object]
    memory: Memory
    seconds: float | None


def make_plan(config: TrainConfig, base: Base, target: Target) -> Plan:
    """Compiles the step for a TPU, or estimates its memory on GPUs, and estimates its time.

    Raises:
      CompileError: it cannot be compiled, for another reason than memory.
    """
    chip, mesh = target.chip, target.mesh
    flops = step_flops(config, base.config, target.attention, base.new_mask_token)
    state, found, time = abstract_state(config, base, mesh), [], None
    if target.is_compiled_for:
        programs = trace_step(config, base, mesh, target.attention)
        # The averaged parameters are no argument of the first of two programs.
        extra = device_bytes(state.ema) / GIB if len(programs) > 1 else 0.0
        memory, texts = compile_step(programs, chip.memory, extra)
        found = [one for hlo in texts for one in collectives(hlo, mesh.size, target.num_slices)]
        within, beyond = (sum(c.sent for c in found if c.between_slices is outside) for outside in (False, True))
    else:
        memory = estimate_memory(config, base, target)
        within, beyond = gpu_sent(config, base, target)
    if memory.fits:
        held = memory.breakdown["arguments" if target.is_compiled_for else "state"]
        temporary = memory.breakdown.get("temporary", memory.needed - held)
        time = estimate_time(config, flops, chip, mesh.size, interconnect=within, network=beyond,
                             memory=memory_traffic(config, base, target, held, temporary))
    shards = math.prod(mesh.shape[axis] for axis in ("fsdp", "context", "tensor", "expert"))
    with_gradients = (device_bytes(state) + device_bytes(state.params)) * shards / GIB
    return Plan(
        target=target.name, num_chips=mesh.size, mesh=dict(mesh.shape), attention=target.attention,
        attention_reason=target.reason, is_compiled=target.is_compiled_for, memory=memory,
        least_chips=math.ceil(with_gradients / chip.memory), flops=flops, time=time,
        sent=by_kind(found) if target.is_compiled_for and memory.fits else None)


def suggest(config: TrainConfig, base: Base, target: Target, plan: Plan,
            progress: Callable[[str], None]) -> list[Trial]:
    """Tries changes to a recipe that does not fit, the smallest first, up to the first that fits.

    Args:
      plan: of the unchanged recipe. If its state alone does not fit, only changes that shrink the state are tried.
    """
    trials, state_too_large = [], plan.least_chips > plan.num_chips
    for settings in changes(config, target):
        if state_too_large and not {"optimizer.offload", "model.param_dtype"} & set(settings):
            continue
        progress("trying " + ", ".join(f"{key}={value}" for key, value in settings.items()))
        plan = make_plan(with_settings(config, settings), base, target)
        trials.append(Trial(settings, plan.memory, plan.time and plan.time.seconds))
        if plan.memory.fits:
            break
    return trials


def changes(config: TrainConfig, target: Target) -> Iterator[dict[str, object]]:
    """Yields settings that need less memory, those that cost the least time first: more micro-batches, full
    rematerialization, both; optimizer state in host memory; parameters and moments in bfloat16, which changes what is
    computed."""
    more = [{"optimizer.accumulate_steps": count}
            for count in micro_batch_counts(config, num_batch_shards(target.mesh))]
    remat = {"model.remat": "full"} if config.model.remat in ("none", "dots") else {}
    yield from more[:-1] if remat else more
    if remat:
        yield remat
        yield from ({**settings, **remat} for settings in more)
    least = {**(more[-1] if more else {}), **remat}
    if target.is_compiled_for and not config.optimizer.offload:
        yield {**least, "optimizer.offload": True}
    if config.model.param_dtype != "bfloat16":
        yield {**least, "model.param_dtype": "bfloat16"}


def micro_batch_counts(config: TrainConfig, batch_shards: int) -> list[int]:
    """Returns about 4 and 16 times the recipe's number of micro-batches, and the number with one row per shard."""
    now, most = config.optimizer.accumulate_steps, config.data.batch_size // batch_shards
    small = [count for count in range(1, math.isqrt(most) + 1) if most % count == 0]
    divisors = sorted({*small, *(most // count for count in small)})
    chosen = {next(count for count in divisors if count >= min(factor * now, most)) for factor in (4, 16, most)}
    return sorted(count for count in chosen if count > now)


def with_settings(config: TrainConfig, settings: dict[str, object]) -> TrainConfig:
    """Returns `config` with the values at dotted keys, such as `data.batch_size`, replaced."""
    for key, value in settings.items():
        group, name = key.split(".")
        config = dataclasses.replace(config, **{group: dataclasses.replace(getattr(config, group), **{name: value})})
    return config


def recipe_lines(config: TrainConfig, base: Base) -> list[str]:
    """Describes the recipe, whatever the devices."""
    tokens, micro_batches = config.data.batch_size * config.data.length, config.optimizer.accumulate_steps
    return [f"model     {config.model.source} ({base.config.family}), "
            f"{count_params(base.config) / 1e6:,.1f}M parameters" + _active(base.config),
            f"run       {config.num_steps:,} steps of {config.data.batch_size} x {config.data.length}"
            + f" in {micro_batches} micro-batches" * (micro_batches > 1)
            + f", {config.num_steps * tokens / 1e9:,.1f}B tokens"]


def plan_lines(plan: Plan) -> list[str]:
    """Describes a plan: whether it fits, what it sends, how long it takes."""
    axes = "".join(f", {axis}={size}" for axis, size in plan.mesh.items() if size > 1)
    reason = f" ({plan.attention_reason})" if plan.attention_reason else ""
    chips = f"{plan.num_chips} chip{'s' * (plan.num_chips > 1)}"
    lines = [f"{plan.target}: {chips}{axes}, {plan.attention} attention{reason}", f"  memory    {_memory(plan)}"]
    if plan.sent is not None:
        kinds = ", ".join(f"{kind} {_bytes(sums['bytes'])} ({sums['count']:,}x)" for kind, sums in plan.sent.items())
        lines.append(f"  sent      {kinds or 'nothing'}")
    if plan.flops.target:
        lines.append(f"  target    its forward pass is {plan.flops.target / plan.flops.model:.0%} of the computation")
    if time := plan.time:
        lines += [f"  step      at least {_seconds(time.floor)} (by {max(time.limits, key=time.limits.get)}), about "
                  f"{_seconds(time.seconds)}; not measured",
                  f"  run       about {_days(time.days)}, {time.chip_hours:,.0f} chip-hours, "
                  f"{time.tokens_per_second:,.0f} tokens/s, utilization {time.utilization:.0%}"]
    return lines


def suggestion_lines(trials: list[Trial]) -> list[str]:
    """Describes each change that was tried, and its result."""
    lines = []
    for trial in trials:
        settings = " ".join(f"--config.{key}={value}" for key, value in trial.settings.items())
        about = f", about {_seconds(trial.seconds)} a step" if trial.seconds else ""
        verdict = "fits" if trial.memory.fits else "does not fit"
        lines.append(f"  {verdict:<14}{settings}: {trial.memory.needed:.2f} GiB{about}")
    return lines or ["  no suggestion: the recipe already uses every setting that saves memory"]


def _active(config: ModelConfig) -> str:
    """Returns what a token uses of a mixture of experts, for people."""
    if config.experts is None:
        return ""
    others = count_params(config) - count_params(config, "blocks")
    return f", of which a token uses {(others + count_active(config)) / 1e6:,.1f}M"


def _memory(plan: Plan) -> str:
    memory = plan.memory
    verdict = "fits" if memory.fits else "DOES NOT FIT"
    if not plan.is_compiled:
        verdict += ", by an estimate"
    breakdown = ", ".join(f"{name} {size:.2f}" for name, size in memory.breakdown.items() if size)
    text = f"{memory.needed:.2f} GiB of {memory.limit:.2f}: {verdict}" + f" ({breakdown})" * bool(breakdown)
    if memory.breakdown.get("host"):
        text += "; the times below do not count the traffic with host memory"
    if not plan.is_compiled and memory.fits and memory.needed > 0.75 * memory.limit:  # JAX's default on GPUs
        text += (f"; set XLA_PYTHON_CLIENT_MEM_FRACTION to {min(memory.needed / memory.limit + 0.03, 0.97):.2f} or "
                 "more")
    if plan.least_chips > plan.num_chips:
        text += f"; state and gradients alone fill {plan.least_chips} such chips"
    return text


def _seconds(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms" if seconds < 0.1 else f"{seconds:.2f} s" if seconds < 100 else f"{seconds:,.0f} s"


def _days(days: float) -> str:
    return f"{days:,.1f} days" if days >= 1 else f"{24 * days:.1f} hours"


def _bytes(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"
