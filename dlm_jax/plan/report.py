"""Plans as people read them."""

from dlm_jax.plan.advice import LargestBatch, Trial
from dlm_jax.plan.base import Base
from dlm_jax.plan.measure import Plan
from dlm_jax.training.config import TrainConfig
from dlm_jax.training.metrics import count_params


def recipe_lines(config: TrainConfig, base: Base) -> list[str]:
    """What is planned, whatever for."""
    tokens = config.data.batch_size * config.data.length
    return _aligned({
        "model": f"{base.source} ({base.config.family}), {count_params(base.config) / 1e6:,.1f}M parameters, "
                 f"as in {base.origin}",
        "run": f"{config.num_steps:,} steps of {config.data.batch_size} x {config.data.length}, "
               f"{config.num_steps * tokens / 1e9:,.1f}B tokens"})


def plan_lines(plan: Plan) -> list[str]:
    """One target: does it fit, what does it send, how long does it take."""
    axes = " ".join(f"{axis}={size}" for axis, size in plan.mesh.items() if size > 1)
    batch = f"{plan.batch_size} x {plan.length}"
    if plan.micro_batches > 1:
        batch += f" in {plan.micro_batches} micro-batches"
    lines = {"batch": f"{batch}, {plan.rows} rows at a time on each part of the mesh",
             "memory": _memory(plan), "sent": _sent(plan), "FLOPs": _flops(plan)}
    if plan.time:
        time, tightest = plan.time, max(plan.time.limits, key=plan.time.limits.get)
        lines["step"] = (f"at least {_seconds(time.floor)} (by {tightest}), about {_seconds(time.seconds)}, at worst "
                         f"{_seconds(time.ceiling)}; not measured")
        lines["run"] = (f"about {time.days:,.1f} days, {time.chip_hours:,.0f} chip-hours, "
                        f"{time.tokens_per_second:,.0f} tokens/s, utilisation {time.utilisation:.0%}")
    attention = f"{plan.attention} attention" + (f" ({plan.attention_reason})" if plan.attention_reason else "")
    head = f"{plan.target}: {plan.num_chips} chip{'s' * (plan.num_chips > 1)}{', ' + axes if axes else ''}, {attention}"
    return [head, *("  " + line for line in _aligned({name: text for name, text in lines.items() if text}))]


def largest_lines(largest: LargestBatch) -> list[str]:
    if not largest.batch_size:
        return ["  largest   no batch fits"]
    bound = f"{largest.refused} does not" if largest.refused else "a larger one was not tried"
    return [f"  largest   data.batch_size={largest.batch_size} fits, at {largest.needed:.2f} GiB; {bound}"]


def advice_lines(trials: list[Trial]) -> list[str]:
    """Each change that was tried, and what it came to."""
    lines = []
    for trial in trials:
        settings = " ".join(f"--config.{key}={value}" for key, value in trial.settings.items())
        about = f", about {_seconds(trial.seconds)} a step" if trial.seconds else ""
        verdict = "fits" if trial.memory.fits else "does not fit"
        lines.append(f"  {verdict:<14}{settings}: {trial.memory.needed:.2f} GiB{about}")
    return lines or ["  nothing that this command could try needs less"]


def _memory(plan: Plan) -> str:
    memory = plan.memory
    verdict = "fits" if memory.fits else "DOES NOT FIT"
    if not plan.is_compiled:
        parts = plan.parts
        share = memory.needed / memory.limit
        hint = f"; set XLA_PYTHON_CLIENT_MEM_FRACTION to {min(share + 0.03, 0.97):.2f} or more" \
            if 0.75 < share <= 1 else ""
        return (f"about {memory.needed:.2f} GiB of {memory.limit:.0f}: {verdict}, by an estimate (state "
                f"{parts.state:.2f}, gradients {parts.gradients:.2f}, activations {parts.activations:.2f}, working "
                f"{parts.working:.2f}){hint}")
    text = f"{memory.needed:.2f} GiB of {memory.limit:.2f}: {verdict}"
    if memory.fits:
        added = f", added up by hand {plan.parts.total:.2f}" if plan.parts else ""
        host = f"; {memory.host:.2f} in the host's, whose traffic no time below counts" if memory.host else ""
        return f"{text} (arguments {memory.arguments:.2f}, temporary {memory.temporary:.2f}{added}){host}"
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


def _flops(plan: Plan) -> str:
    return (f"{plan.flops.model:.3g} a step, {plan.flops.executed / plan.flops.model:.2f} times that with what is done "
            "again")


def _seconds(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms" if seconds < 0.1 else f"{seconds:.2f} s" if seconds < 100 else f"{seconds:,.0f} s"


def _bytes(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def _aligned(rows: dict[str, str]) -> list[str]:
    return [f"{name:<8}  {text}" for name, text in rows.items()]
