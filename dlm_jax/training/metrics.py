"""What a run reports: one JSON line a record, TensorBoard and Weights & Biases beside it, a line on the console."""

import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import jax
from tqdm import tqdm

from dlm_jax.errors import ConfigError, TrainingError
from dlm_jax.training.config import LogConfig

_SCHEDULED = ("learning_rate", "anneal_ratio")


class Window:
    """Means of the metrics of the steps since the last record; its state is saved, so that a resumed run agrees."""

    def __init__(self, sums: Mapping[str, float] | None = None, scheduled: Mapping[str, float] | None = None,
                 steps: int = 0):
        self.sums, self.scheduled, self.steps = dict(sums or {}), dict(scheduled or {}), steps

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes in one step's metrics.

        Raises:
          TrainingError: the loss or the gradient is not finite.
        """
        for name in ("loss", "grad_norm"):
            if not math.isfinite(metrics[name]):
                raise TrainingError(
                    f"the {name} is {metrics[name]} at step {step}; checkpoints of earlier steps are kept: resume from "
                    "one with a lower learning rate, or look at the data of this step")
        for name, value in metrics.items():
            if name in _SCHEDULED:
                self.scheduled[name] = value
            else:
                self.sums[name] = self.sums.get(name, 0.0) + value
        self.steps += 1

    def means(self) -> dict[str, float]:
        """The mean of each metric; of those that follow a schedule the latest value."""
        return {name: total / self.steps for name, total in self.sums.items()} | self.scheduled

    def clear(self) -> None:
        self.sums, self.scheduled, self.steps = {}, {}, 0

    def state(self) -> dict[str, object]:
        return {"sums": self.sums, "scheduled": self.scheduled, "steps": self.steps}


class MetricsLog:
    """Writes records to every place asked for; only the first process does.

    Args:
      first_step: records of later steps, left by a run that went further than its last checkpoint, are dropped.
    """

    def __init__(self, workdir: Path, log: LogConfig, config: Mapping[str, object], first_step: int):
        self._file = self._board = self._wandb = None
        if jax.process_index() != 0:
            return
        path = workdir / "metrics.jsonl"
        truncate_records(path, first_step)
        self._file = path.open("a", buffering=1)
        if log.tensorboard:
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=first_step + 1)
        if log.wandb:
            self._wandb = _wandb_run(log.wandb, workdir, config)

    def write(self, step: int, kind: str, values: Mapping[str, float | str]) -> None:
        """One record: `kind` is "train", "validation" or "sample"."""
        if self._file is None:
            return
        self._file.write(json.dumps({"step": step, "kind": kind, **values}) + "\n")
        if self._board is not None:
            for name, value in values.items():
                add = self._board.add_text if isinstance(value, str) else self._board.add_scalar
                add(f"{kind}/{name}", value, step)
        if self._wandb is not None:
            self._wandb.log({f"{kind}/{name}": value for name, value in values.items()}, step=step)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def truncate_records(path: Path, last_step: int) -> None:
    """Drops the records past `last_step`, and a line cut short by a crash."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= last_step:
                kept.append(line + "\n")
        except ValueError:
            continue
    beside = path.with_suffix(".jsonl.new")
    beside.write_text("".join(kept))
    os.replace(beside, path)


def read_records(workdir: Path, kind: str | None = None) -> list[dict]:
    """The records of a run, in order; of one kind without naming it."""
    path = workdir / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if kind is None:
        return records
    return [record for record in records if record.pop("kind") == kind]


def _wandb_run(project: str, workdir: Path, config: Mapping[str, object]) -> object:
    try:
        import wandb
    except ImportError:
        raise ConfigError("log.wandb is set, but the package wandb is not installed; install it, or leave "
                          "log.wandb empty") from None
    return wandb.init(project=project, name=workdir.name, id=workdir.name, resume="allow", dir=str(workdir),
                      config=dict(config))


class Console:
    """Lines for people, and below them a bar on a terminal; without a terminal only the lines."""

    def __init__(self, total: int, done: int):
        show = jax.process_index() == 0
        self._show = show
        self._bar = tqdm(total=total, initial=done, unit="step", disable=not (show and sys.stderr.isatty()),
                         dynamic_ncols=True, smoothing=0.1)

    def step(self, loss: float) -> None:
        self._bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
        self._bar.update()

    def line(self, text: str) -> None:
        if not self._show:
            return
        if self._bar.disable:
            print(text, flush=True)
        else:
            self._bar.write(text)

    def close(self) -> None:
        self._bar.close()
