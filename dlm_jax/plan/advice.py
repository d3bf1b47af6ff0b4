"""What would fit: the largest batch of a recipe, and changes to a recipe that does not fit, each one tried."""

import dataclasses
from collections.abc import Callable, Iterator

from dlm_jax.parallel import num_batch_shards
from dlm_jax.plan.base import Base
from dlm_jax.plan.compiled import Memory
from dlm_jax.plan.measure import Plan, make_plan
from dlm_jax.plan.search import largest_that_fits
from dlm_jax.plan.targets import Target
from dlm_jax.training.config import TrainConfig

Note = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class LargestBatch:
    """`batch_size` fits (0: no batch does), and `refused`, the next larger one that was tried, does not.

    Attributes:
      needed: GiB of a chip at `batch_size`.
      trials: how many batches were tried.
    """

    batch_size: int
    needed: float
    refused: int | None
    trials: int


@dataclasses.dataclass(frozen=True)
class Trial:
    """Settings that were tried in place of the recipe's, and what came of it: `seconds` a step, about, if they fit."""

    settings: dict[str, object]
    memory: Memory
    seconds: float | None


def largest_batch(config: TrainConfig, base: Base, target: Target, plan: Plan, note: Note) -> LargestBatch:
    """The largest `data.batch_size` that fits, with as many micro-batches as the recipe has.

    Args:
      plan: of the recipe as it is, which is the first trial.
    """
    unit = num_batch_shards(target.mesh) * config.optimizer.accumulate_steps
    known = {plan.rows: plan.memory}

    def needs(rows: int) -> tuple[bool, float]:
        if rows not in known:
            note(f"trying data.batch_size={rows * unit}")
            changed = with_settings(config, {"data.batch_size": rows * unit})
            known[rows] = make_plan(changed, base, target).memory
        return known[rows].fits, known[rows].needed

    found = largest_that_fits(needs, target.chip.memory, plan.rows)
    return LargestBatch(found.largest * unit, known[found.largest].needed if found.largest else 0.0,
                        found.refused and found.refused * unit, found.trials)


def advise(config: TrainConfig, base: Base, target: Target, plan: Plan, note: Note) -> list[Trial]:
    """Tries changes to a recipe that does not fit, the least first, up to the first that fits, which is the last.

    Args:
      plan: of the recipe as it is. Where its state alone does not fit, only what shrinks the state is tried.
    """
    trials, too_large = [], plan.least_chips > plan.num_chips
    for settings in changes(config, target):
        if too_large and not {"optimizer.offload", "model.param_dtype"} & set(settings):
            continue
        note("trying " + ", ".join(f"{key}={value}" for key, value in settings.items()))
        plan = make_plan(with_settings(config, settings), base, target)
        trials.append(Trial(settings, plan.memory, plan.time and plan.time.seconds))
        if plan.memory.fits:
            break
    return trials


def changes(config: TrainConfig, target: Target) -> Iterator[dict[str, object]]:
    """Settings that need less memory, those first that cost the least time: more micro-batches, rematerialisation of
    whole layers, both; the optimizer's state in the host's memory; at last parameters and moments in bfloat16, which
    changes what is computed."""
    counts = micro_batch_counts(config, num_batch_shards(target.mesh))
    more = [{"optimizer.accumulate_steps": count} for count in counts]
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


def micro_batch_counts(config: TrainConfig, parts: int) -> list[int]:
    """About 4 and 16 times as many micro-batches as the recipe's, and as many as leave one row to each part."""
    now, most = config.optimizer.accumulate_steps, config.data.batch_size // parts
    possible = [count for count in range(now + 1, most + 1) if most % count == 0]
    wanted = [next((count for count in possible if count >= factor * now), most) for factor in (4, 16)]
    return sorted({*wanted, most} & set(possible))


def with_settings(config: TrainConfig, settings: dict[str, object]) -> TrainConfig:
    """`config` with the leaves at these dotted keys replaced."""
    for key, value in settings.items():
        config = _replace(config, key.split("."), value)
    return config


def _replace(config: object, path: list[str], value: object) -> object:
    name, *rest = path
    return dataclasses.replace(config, **{name: _replace(getattr(config, name), rest, value) if rest else value})
