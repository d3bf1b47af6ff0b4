"""The plan of a recipe on some devices: what it needs, what would fit instead, and both as lines of text."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator

from dlm_jax.parallel import num_batch_shards
from dlm_jax.parallel.chips import GIB
from dlm_jax.plan.collectives import by_kind, collectives
from dlm_jax.plan.compile import Base, DeviceMemory, abstract_state, compile_step, trace_step
from dlm_jax.plan.memory import StepMemory, device_bytes, estimate_memory
from dlm_jax.plan.roofline import Estimate, Flops, Traffic, estimate, gpu_traffic, memory_traffic, step_flops
from dlm_jax.plan.topology import Target, has_analytic_estimate
from dlm_jax.training.config import TrainConfig
from dlm_jax.training.metrics import count_params

Progress = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Plan:
    """A step of a recipe on some devices; figures are per chip (JAX device) unless stated otherwise.

    Attributes:
      is_compiled: whether the compiler has decided; otherwise memory, and so fitting, is an estimate.
      rows: of a micro-batch, per shard of the batch.
      memory: needed and available.
      memory_estimate: without compiling; None where there is no analytic estimate.
      state: GiB of parameters, moments and average, as sharded.
      least_chips: chips that could hold the state and its gradients, fully sharded, and nothing else.
      sent: by kind of collective `{"count": per step, "bytes": sent per step}`; None if not compiled.
      unbounded: collectives in loops whose trip count depends on the data, which are counted once.
      flops: of a step over all chips.
      time: an estimate; None for a step that does not fit.
      compile_seconds: None if not compiled.
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
    memory: DeviceMemory
    memory_estimate: StepMemory | None
    state: float
    least_chips: int
    sent: dict[str, dict[str, float]] | None
    unbounded: int
    flops: Flops
    time: Estimate | None
    compile_seconds: float | None


@dataclasses.dataclass(frozen=True)
class LargestBatch:
    """`batch_size` fits (0: no batch does) with `needed` GiB per chip; `refused`, the smallest that does not fit."""

    batch_size: int
    needed: float
    refused: int | None
    trials: int


@dataclasses.dataclass(frozen=True)
class Trial:
    """The memory of a recipe with changed settings; `seconds` per step, estimated, if it fits."""

    settings: dict[str, object]
    memory: DeviceMemory
    seconds: float | None


def make_plan(config: TrainConfig, base: Base, target: Target) -> Plan:
    """Compiles the step for a TPU, or estimates its memory on GPUs, and estimates its time.

    Raises:
      CompileError: it cannot be compiled, for another reason than memory.
    """
    flops = step_flops(config, base.config, target.attention, base.new_mask_token)
    state, shape, limit = abstract_state(config, base, target.mesh), target.mesh.shape, target.chip.memory
    sent, unbounded, seconds, traffic = None, 0, None, None
    analytic = (estimate_memory(config, base, target.mesh, target.attention)
                if has_analytic_estimate(config, shape) else None)
    if target.is_compiled_for:
        programs = trace_step(config, base, target.mesh, target.attention)
        # The averaged parameters are no argument of the first of two programs.
        extra = device_bytes(state.ema) / GIB if len(programs) > 1 else 0.0
        started = time.perf_counter()
        memory, texts = compile_step(programs, limit, extra)
        seconds = time.perf_counter() - started
        if memory.fits:
            found = [one for hlo in texts for one in collectives(hlo, target.mesh.size, target.num_slices)]
            sent, unbounded = by_kind(found), sum(not c.is_bounded for c in found)
            traffic = Traffic(memory_traffic(config, base, target, memory.arguments, memory.temporary),
                              sum(c.sent for c in found if not c.between_slices),
                              sum(c.sent for c in found if c.between_slices))
    else:
        memory = DeviceMemory(analytic.total, limit, analytic.total <= limit)
        traffic = gpu_traffic(config, base, target, analytic)
    with_gradients = device_bytes(state) + device_bytes(state.params)
    shards = shape["fsdp"] * shape["context"] * shape["tensor"]
    return Plan(
        target=target.name, chip=target.chip.name, num_chips=target.mesh.size, mesh=dict(shape),
        attention=target.attention, attention_reason=target.reason, batch_size=config.data.batch_size,
        length=config.data.length, micro_batches=config.optimizer.accumulate_steps,
        rows=config.data.batch_size // _batch_unit(config, target), is_compiled=target.is_compiled_for, memory=memory,
        memory_estimate=analytic, state=device_bytes(state) / GIB,
        least_chips=math.ceil(with_gradients * shards / GIB / limit), sent=sent, unbounded=unbounded,
        flops=flops, compile_seconds=seconds,
        time=estimate(config, flops, traffic, target.chip, target.mesh.size) if memory.fits else None)


def largest_batch(config: TrainConfig, base: Base, target: Target, plan: Plan, progress: Progress) -> LargestBatch:
    """Finds the largest `data.batch_size` that fits with the recipe's number of micro-batches.

    Args:
      plan: of the unchanged recipe, the first trial.
    """
    unit, known = _batch_unit(config, target), {plan.rows: plan.memory}

    def needs(rows: int) -> float | None:
        if rows not in known:
            progress(f"trying data.batch_size={rows * unit}")
            known[rows] = make_plan(with_settings(config, {"data.batch_size": rows * unit}), base, target).memory
        return known[rows].needed if known[rows].fits else None

    largest, refused = largest_that_fits(needs, target.chip.memory, plan.rows)
    return LargestBatch(largest * unit, known[largest].needed if largest else 0.0, refused and refused * unit,
                        len(known))


def largest_that_fits(needs: Callable[[int], float | None], limit: float, start: int = 1,
                      max_trials: int = 10) -> tuple[int, int | None]:
    """Searches from `start` along the line through the numbers that fitted, to where it meets `limit`.

    Args:
      needs: returns what a number needs; None if it does not fit.

    Returns:
      (the largest number that fits, or 0; the smallest tried that does not, or None).
    """
    fitted, refused, guess = {0: 0.0}, None, start
    for _ in range(max_trials):
        if guess == refused or guess in fitted:
            break
        need = needs(guess)
        if need is None:
            refused = min(guess, refused or guess)
        else:
            fitted[guess] = need
        second, largest = [None, *sorted(fitted)][-2:]
        if largest == 0:
            guess = (refused or 2) // 2
            continue
        guess = 2 * largest
        if second:
            slope = max((fitted[largest] - fitted[second]) / (largest - second), 1e-9)
            guess = int(min(max(largest + (limit - fitted[largest]) / slope, largest + 1), 8 * largest))
        if refused is not None and guess >= refused:
            guess = (largest + refused) // 2
    return max(fitted), refused


def suggest(config: TrainConfig, base: Base, target: Target, plan: Plan, progress: Progress) -> list[Trial]:
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
    tokens = config.data.batch_size * config.data.length
    return _aligned({
        "model": f"{base.source} ({base.config.family}), {count_params(base.config) / 1e6:,.1f}M parameters, "
                 f"as in {base.origin}",
        "run": f"{config.num_steps:,} steps of {config.data.batch_size} x {config.data.length}, "
               f"{config.num_steps * tokens / 1e9:,.1f}B tokens"})


def plan_lines(plan: Plan) -> list[str]:
    """Describes a plan: whether it fits, what it sends, how long it takes."""
    axes = " ".join(f"{axis}={size}" for axis, size in plan.mesh.items() if size > 1)
    batch = f"{plan.batch_size} x {plan.length}"
    if plan.micro_batches > 1:
        batch += f" in {plan.micro_batches} micro-batches"
    lines = {"batch": f"{batch}, {plan.rows} rows at a time per shard of the batch",
             "memory": _memory(plan), "sent": _sent(plan),
             "FLOPs": f"{plan.flops.model:.3g} a step, {plan.flops.executed / plan.flops.model:.2f} times that with "
                      "recomputation"}
    if plan.time:
        time, tightest = plan.time, max(plan.time.limits, key=plan.time.limits.get)
        lines["step"] = (f"at least {_seconds(time.floor)} (by {tightest}), about {_seconds(time.seconds)}, at worst "
                         f"{_seconds(time.ceiling)}; not measured")
        lines["run"] = (f"about {time.days:,.1f} days, {time.chip_hours:,.0f} chip-hours, "
                        f"{time.tokens_per_second:,.0f} tokens/s, utilization {time.utilization:.0%}")
    attention = f"{plan.attention} attention" + (f" ({plan.attention_reason})" if plan.attention_reason else "")
    head = f"{plan.target}: {plan.num_chips} chip{'s' * (plan.num_chips > 1)}{', ' + axes if axes else ''}, {attention}"
    return [head, *("  " + line for line in _aligned({name: text for name, text in lines.items() if text}))]


def largest_lines(largest: LargestBatch) -> list[str]:
    if not largest.batch_size:
        return ["  largest   no batch fits"]
    bound = f"{largest.refused} does not" if largest.refused else "a larger one was not tried"
    return [f"  largest   data.batch_size={largest.batch_size} fits, at {largest.needed:.2f} GiB; {bound}"]


def suggestion_lines(trials: list[Trial]) -> list[str]:
    """Describes each change that was tried, and its result."""
    lines = []
    for trial in trials:
        settings = " ".join(f"--config.{key}={value}" for key, value in trial.settings.items())
        about = f", about {_seconds(trial.seconds)} a step" if trial.seconds else ""
        verdict = "fits" if trial.memory.fits else "does not fit"
        lines.append(f"  {verdict:<14}{settings}: {trial.memory.needed:.2f} GiB{about}")
    return lines or ["  no suggestion: the recipe already uses every setting that saves memory"]


def _memory(plan: Plan) -> str:
    memory, parts = plan.memory, plan.memory_estimate
    verdict = "fits" if memory.fits else "DOES NOT FIT"
    if not plan.is_compiled:
        share = memory.needed / memory.limit
        hint = f"; set XLA_PYTHON_CLIENT_MEM_FRACTION to {min(share + 0.03, 0.97):.2f} or more" \
            if 0.75 < share <= 1 else ""
        return (f"about {memory.needed:.2f} GiB of {memory.limit:.0f}: {verdict}, by an estimate (state "
                f"{parts.state:.2f}, gradients {parts.gradients:.2f}, activations {parts.activations:.2f}, working "
                f"{parts.working:.2f}){hint}")
    text = f"{memory.needed:.2f} GiB of {memory.limit:.2f}: {verdict}"
    if memory.fits:
        analytic = f", without compiling {parts.total:.2f}" if parts else ""
        host = f"; {memory.host:.2f} in host memory, whose traffic the times below do not count" if memory.host else ""
        return f"{text} (arguments {memory.arguments:.2f}, temporary {memory.temporary:.2f}{analytic}){host}"
    if plan.least_chips > plan.num_chips:
        text += f"; state and gradients alone fill {plan.least_chips} such chips"
    return text


def _sent(plan: Plan) -> str:
    if plan.sent is None:
        return ""
    kinds = ", ".join(f"{kind} {_bytes(sums['bytes'])} ({sums['count']:,}x)" for kind, sums in plan.sent.items())
    if plan.unbounded:
        kinds += f"; {plan.unbounded} of them in loops whose length depends on the data, counted once"
    return kinds or "nothing"


def _batch_unit(config: TrainConfig, target: Target) -> int:
    """Returns the batch size with one row at a time per shard of the batch."""
    return num_batch_shards(target.mesh) * config.optimizer.accumulate_steps


def _seconds(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms" if seconds < 0.1 else f"{seconds:.2f} s" if seconds < 100 else f"{seconds:,.0f} s"


def _bytes(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def _aligned(rows: dict[str, str]) -> list[str]:
    return [f"{name:<8}  {text}" for name, text in rows.items()]
