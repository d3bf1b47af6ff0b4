"""How much the quickstart does: all of its recipe if that takes minutes on this machine, else what fits into them.

The time is estimated from a few steps that were timed, see `training.probe`; everything else is counted in forward
passes of a row.
"""

import dataclasses
import math
import pathlib
from typing import TYPE_CHECKING, Any, Self

from dlm_jax.errors import ConfigError

if TYPE_CHECKING:
    from dlm_jax.training import TrainConfig
    from dlm_jax.training.probe import Probe

MINUTES = 15.0  # of everything, where the recipe would take longer
SAMPLED_STEPS = 96  # denoising steps of a text
_SAMPLED_ROWS = 3
_FEWEST_STEPS = 20
_COMPARED_STEPS = 200  # fewer show little of the comparison with random weights, which takes half of the time
_PASSES = 4  # forward passes of a row that take as long as its share of a step
_RECIPE_PARAMS = 2.6e6  # the model that the recipe's learning rate is for


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a quickstart does.

    Attributes:
      compares: whether the same network is also trained from random weights.
      num_masks: samples of the bound per row at the end.
    """

    num_steps: int
    num_rows: int
    num_masks: int
    compares: bool
    learning_rate: float

    def apply(self, config: "TrainConfig") -> "TrainConfig":
        """Returns the recipe with this much training and validation, and its schedules in proportion."""
        config = dataclasses.replace(config, optimizer=dataclasses.replace(
            config.optimizer, learning_rate=self.learning_rate))
        if self == whole_recipe(config):
            return config
        share, every = self.num_steps / config.num_steps, max(1, math.ceil(self.num_steps / 2))
        return dataclasses.replace(
            config, num_steps=self.num_steps,
            objective=dataclasses.replace(config.objective, anneal_steps=round(share * config.objective.anneal_steps)),
            optimizer=dataclasses.replace(config.optimizer,
                                          warmup_steps=round(share * config.optimizer.warmup_steps)),
            validation=dataclasses.replace(config.validation, every=every, num_rows=self.num_rows),
            checkpoint=dataclasses.replace(config.checkpoint, every=2 * every),
            log=dataclasses.replace(config.log, every=max(1, min(config.log.every, self.num_steps // 8))))

    def save(self, path: pathlib.Path) -> None:
        """Writes the plan, for the next time that the same command is given."""
        from dlm_jax.storage import write_json

        write_json(path, dataclasses.asdict(self))

    @classmethod
    def load(cls, path: pathlib.Path) -> Self | None:
        """Reads a plan; None if there is none."""
        from dlm_jax.storage import read_json

        return cls(**read_json(path)) if path.is_file() else None


def whole_recipe(config: "TrainConfig") -> Plan:
    """Returns the plan that changes nothing of the recipe."""
    return Plan(config.num_steps, config.validation.num_rows, 16, True, config.optimizer.learning_rate)


def choose_plan(config: "TrainConfig", probe: "Probe", minutes: float | None) -> Plan:
    """Returns the recipe as it is if it takes at most MINUTES; else, or for `minutes`, what fits into them.

    Raises:
      ConfigError: `minutes` is not positive.
    """
    if minutes is not None and not minutes > 0:
        raise ConfigError(f"--minutes must be positive, got {minutes:g}")
    whole = whole_recipe(config)
    if minutes is None and estimate_seconds(whole, config, probe) <= 60 * MINUTES:
        return whole
    budget = 60 * (MINUTES if minutes is None else minutes)

    def fitting(**choice: Any) -> Plan:
        plan = dataclasses.replace(whole, num_steps=_FEWEST_STEPS, num_rows=16, num_masks=8, **choice)
        left = budget - estimate_seconds(plan, config, probe)
        steps = _FEWEST_STEPS + max(0, int(left / (probe.step_seconds * (1 + plan.compares))))
        return dataclasses.replace(plan, num_steps=steps if minutes is not None else min(steps, config.num_steps))

    compared = fitting(compares=True)
    return compared if compared.num_steps >= _COMPARED_STEPS else fitting(compares=False)


def estimate_seconds(plan: Plan, config: "TrainConfig", probe: "Probe") -> float:
    """Returns about how long a plan takes, without downloads."""
    is_whole, config, runs = plan == whole_recipe(config), plan.apply(config), 1 + plan.compares
    row = probe.step_seconds / (_PASSES * config.data.batch_size)
    validations = 1 + math.ceil(config.num_steps / config.validation.every)
    training = runs * (probe.setup_seconds + config.num_steps * probe.step_seconds
                       + validations * plan.num_rows * config.validation.num_samples * row)
    evaluation = plan.num_rows * (1 + (1 + runs) * plan.num_masks) * row
    sampling = SAMPLED_STEPS * _SAMPLED_ROWS * row
    # The probe's program is kept for a run of as many steps; those that evaluate and sample take as long together.
    compilation = probe.compile_seconds * (1 if is_whole else 2)
    return training + evaluation + sampling + compilation + probe.setup_seconds


def scale_learning_rate(recipe: float, params: int) -> float:
    """Returns the recipe's learning rate for a model of another size: larger models need smaller ones.

    It falls with the root of the number of parameters. From the recipe's 1.5e-3 for 2.6 million follow 2.2e-4 for GPT-2
    small and 2.9e-5 for LLaMA-2-7B, where DiffuGPT and DiffuLLaMA have 3e-4 and 2e-5 (arXiv 2410.17891).
    """
    return float(f"{recipe * min(1.0, math.sqrt(_RECIPE_PARAMS / params)):.1e}")


def describe(plan: Plan, config: "TrainConfig", probe: "Probe", base: str, params: int) -> str:
    """Returns what the quickstart will do and about how long it takes, for people."""
    seconds, tokens = estimate_seconds(plan, config, probe), config.data.batch_size * config.data.length
    compared = f", trains random weights for {plan.num_steps:,} steps too" if plan.compares else ""
    lines = [f"plan: adapts {base} ({probe.model.family}, {params / 1e6:,.1f} million parameters) in "
             f"{plan.num_steps:,} steps of {tokens:,} tokens{compared}, then measures, samples and exports it: about "
             f"{_minutes(seconds)} on this machine, by steps that were timed ({probe.step_seconds:.2g} s each); "
             "--minutes changes it"]
    whole = estimate_seconds(whole_recipe(config), config, probe)
    if plan.num_steps < config.num_steps:
        without = "" if plan.compares else ", and leaves out the comparison with random weights"
        lines.append(f"(the whole recipe would take about {_minutes(whole)} here; this shows the effect on fewer "
                     f"steps{without})")
    lines.append("(the paper adapts GPT-2 with 131 billion tokens; a small budget shows the effect, not the full "
                 "quality)")
    return "\n".join(lines)


def _minutes(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
