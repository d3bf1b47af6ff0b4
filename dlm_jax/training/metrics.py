"""What a run reports: one JSON line a record, TensorBoard and Weights & Biases beside it, a line on the console."""

import contextlib
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import jax
from etils import epath
from tqdm import tqdm

from dlm_jax.errors import ConfigError, TrainingError
from dlm_jax.storage import is_remote, upload
from dlm_jax.training.config import LogConfig

METRICS = "metrics.jsonl"
_COPY_SECONDS = 30
_SCHEDULED = ("learning_rate", "anneal_ratio")
_MOST_SKIPPED = 20  # steps in a row: then it is no accident


class Window:
    """Means of the metrics of the steps since the last record; its state is saved, so that a resumed run agrees.

    Args:
      skip: whether steps whose loss or gradient is not finite have changed nothing, and are counted instead.
    """

    def __init__(self, skip: bool = False, sums: Mapping[str, float] | None = None,
                 scheduled: Mapping[str, float] | None = None, steps: int = 0, skipped: int = 0, in_a_row: int = 0):
        self.skip, self.sums, self.scheduled = skip, dict(sums or {}), dict(scheduled or {})
        self.steps, self.skipped, self.in_a_row = steps, skipped, in_a_row

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes in one step's metrics.

        Raises:
          TrainingError: the loss or the gradient is not finite, or has not been for many steps where they are skipped.
        """
        bad = next((name for name in ("loss", "grad_norm") if not math.isfinite(metrics[name])), None)
        self.in_a_row = self.in_a_row + 1 if bad else 0
        if bad and not (self.skip and self.in_a_row < _MOST_SKIPPED):
            times = f" and has not been finite for {self.in_a_row} steps" if self.in_a_row > 1 else ""
            raise TrainingError(
                f"the {bad} is {metrics[bad]} at step {step}{times}; checkpoints of earlier steps are kept: resume "
                "from one with a lower learning rate, or look at the data of this step")
        if bad:
            self.skipped += 1
            return
        for name, value in metrics.items():
            if name in _SCHEDULED:
                self.scheduled[name] = value
            else:
                self.sums[name] = self.sums.get(name, 0.0) + value
        self.steps += 1

    def means(self) -> dict[str, float]:
        """The mean of each metric; of those that follow a schedule the latest value; how many steps were skipped."""
        means = {name: total / self.steps for name, total in self.sums.items()} | self.scheduled
        return means | ({"skipped": self.skipped} if self.skipped else {})

    def clear(self) -> None:
        self.sums, self.scheduled, self.steps, self.skipped = {}, {}, 0, 0

    def state(self) -> dict[str, object]:
        """A copy: it is written in the background, while the next steps are added."""
        return {"sums": dict(self.sums), "scheduled": dict(self.scheduled), "steps": self.steps,
                "skipped": self.skipped, "in_a_row": self.in_a_row}


class MetricsLog:
    """Writes records to every place asked for; only the first process does.

    Where the workdir is on an object store, whose files cannot be appended to, they are kept in a local folder and
    copied there every so often.

    Args:
      first_step: records of later steps, left by a run that went further than its last checkpoint, are dropped.
    """

    def __init__(self, workdir: epath.Path, log: LogConfig, config: Mapping[str, object], first_step: int):
        self._file = self._board = self._wandb = self._remote = None
        if jax.process_index() != 0:
            return
        self._folder = workdir
        if is_remote(workdir):
            self._remote, self._copied = workdir, time.monotonic()
            self._folder = epath.Path(tempfile.mkdtemp(prefix="dlm_jax-logs-"))
            if (workdir / METRICS).exists():
                (self._folder / METRICS).write_text((workdir / METRICS).read_text())
        # A run that died before its first checkpoint begins anew, with its validation at step 0.
        truncate_records(self._folder / METRICS, first_step or -1)
        self._file = open(self._folder / METRICS, "a", buffering=1)  # noqa: SIM115
        if log.tensorboard:
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(self._folder / "tensorboard"), purge_step=first_step + 1)
        if log.wandb:
            self._wandb = _wandb_run(log.wandb, self._folder, workdir.name, config)

    def write(self, step: int, kind: str, values: Mapping[str, float | str]) -> None:
        """One record: `kind` is "train", "validation", "answers" or "sample".

        Raises:
          TrainingError: it cannot be written.
        """
        if self._file is None:
            return
        try:
            self._file.write(json.dumps({"step": step, "kind": kind, **values}) + "\n")
        except OSError as error:
            raise TrainingError(f"{self._folder / METRICS} cannot be written ({error.strerror}); make room there, and "
                                "the same command goes on from the last checkpoint") from error
        if self._board is not None:
            for name, value in values.items():
                add = self._board.add_text if isinstance(value, str) else self._board.add_scalar
                add(f"{kind}/{name}", value, step)
        if self._wandb is not None:
            self._wandb.log({f"{kind}/{name}": value for name, value in values.items()}, step=step)
        if self._remote is not None and time.monotonic() > self._copied + _COPY_SECONDS:
            self._copy()

    def close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # what could not be written has been told
                self._file.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()
        if self._remote is not None:
            self._copy()
            shutil.rmtree(self._folder)

    def _copy(self) -> None:
        upload(Path(self._folder), self._remote)
        self._copied = time.monotonic()


def truncate_records(path: epath.Path, last_step: int) -> None:
    """Drops the records past `last_step`, and a line cut short by a crash."""
    if not path.exists():
        return
    kept = [json.dumps(record) + "\n" for record in _records(path) if record["step"] <= last_step]
    beside = path.with_suffix(".jsonl.new")
    beside.write_text("".join(kept))
    os.replace(beside, path)


def read_records(workdir: epath.Path, kind: str | None = None) -> list[dict]:
    """The records of a run, in order; of one kind without naming it."""
    path = workdir / METRICS
    records = _records(path) if path.exists() else []
    if kind is None:
        return records
    return [record for record in records if record.pop("kind") == kind]


def _records(path: epath.Path) -> list[dict]:
    """All but a last one that is only half there: it is being written, or was when the run died."""
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1]]


def _wandb_run(project: str, folder: epath.Path, name: str, config: Mapping[str, object]) -> object:
    try:
        import wandb
    except ImportError:
        raise ConfigError("log.wandb is set, but the package wandb is not installed; install it, or leave "
                          "log.wandb empty") from None
    return wandb.init(project=project, name=name, id=name, resume="allow", dir=str(folder), config=dict(config))


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
