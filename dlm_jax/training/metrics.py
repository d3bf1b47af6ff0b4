"""What a run reports: goodput, the metrics of its steps, the log and the console."""

import contextlib
import dataclasses
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
from etils import epath
from tqdm import tqdm

from dlm_jax.errors import ConfigError, TrainingError
from dlm_jax.storage import is_remote, upload
from dlm_jax.training.config import LogConfig

METRICS_FILE = "metrics.jsonl"
# What the time of a run goes into. `lost_steps`: steps after the last checkpoint, which a resumed run repeats.
CATEGORIES = ("startup", "compilation", "steps", "data_stall", "validation", "checkpointing", "sampling", "lost_steps")

_COPY_SECONDS = 30
_SCHEDULED = ("learning_rate", "anneal_ratio")
_MAX_SKIPPED = 20  # consecutive steps


# ---- Goodput: what the time of a run goes into, over all its starts.


class GoodputClock:
    """Adds up seconds by category, and measures the steps between records."""

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(CATEGORIES, 0.0)
        self._category, self._since = "startup", time.monotonic()
        self._start_interval()

    def add(self, seconds: Mapping[str, float]) -> None:
        """Adds the seconds by category of earlier starts."""
        for category, value in seconds.items():
            self._seconds[category] += value
        self._start_interval()

    @contextlib.contextmanager
    def measure(self, category: str) -> Iterator[None]:
        """Counts the time inside the context as `category`."""
        before = self._category
        self.switch(category)
        yield
        self.switch(before)

    def switch(self, category: str) -> None:
        """Counts time as `category` from now on."""
        now = time.monotonic()
        self._seconds[self._category] += now - self._since
        self._category, self._since = category, now

    def count_step(self, scored: float) -> None:
        """Counts a step whose results have arrived, with its number of scored tokens."""
        self.switch(self._category)
        now = self._training_seconds()
        self._steps, self._scored = self._steps + 1, self._scored + scored
        self._slowest, self._last_step = max(self._slowest, now - self._last_step), now

    def end_interval(self) -> dict[str, float]:
        """Returns the measures since the last call, and starts a new interval.

        `steps`, `scored` tokens, `seconds` of training, of which `data_stall` waiting for data, and of the `slowest`
        step.
        """
        self.switch(self._category)
        seconds = self._training_seconds() - self._interval_start
        interval = {"steps": self._steps, "scored": self._scored, "seconds": max(seconds, 1e-9),
                    "data_stall": self._seconds["data_stall"] - self._stall_start, "slowest": self._slowest}
        self._start_interval()
        return interval

    def seconds(self) -> dict[str, float]:
        """Returns the seconds by category until now."""
        self.switch(self._category)
        return dict(self._seconds)

    def goodput(self) -> float:
        """Returns the share of all time that went into steps that count."""
        seconds = self.seconds()
        return seconds["steps"] / max(sum(seconds.values()), 1e-9)

    def line(self) -> str:
        """Returns the shares of all categories that took at least a thousandth, for people."""
        seconds = self.seconds()
        total = max(sum(seconds.values()), 1e-9)
        shares = sorted(((value / total, category) for category, value in seconds.items()), reverse=True)
        return ", ".join(f"{category} {share:.1%}" for share, category in shares if share >= 1e-3)

    def _training_seconds(self) -> float:
        return self._seconds["steps"] + self._seconds["data_stall"]

    def _start_interval(self) -> None:
        self._steps, self._scored, self._slowest = 0, 0.0, 0.0
        self._interval_start = self._last_step = self._training_seconds()
        self._stall_start = self._seconds["data_stall"]


# ---- The metrics of steps.


@dataclasses.dataclass
class MetricAccumulator:
    """Means of the metrics of the steps since the last record; its state is saved, so that a resumed run agrees.

    Attributes:
      skip: whether steps whose loss or gradient is not finite have changed nothing, and are counted instead.
      sums: of each metric over `steps`.
      scheduled: the latest value of metrics that follow a schedule.
      skipped: such steps since the last record.
      consecutive: such steps without another between them.
    """

    skip: bool = False
    sums: dict[str, float] = dataclasses.field(default_factory=dict)
    scheduled: dict[str, float] = dataclasses.field(default_factory=dict)
    steps: int = 0
    skipped: int = 0
    consecutive: int = 0

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds one step's metrics.

        Raises:
          TrainingError: the loss or the gradient is not finite, or has not been for many steps where they are skipped.
        """
        bad = next((name for name in ("loss", "grad_norm") if not math.isfinite(metrics[name])), None)
        self.consecutive = self.consecutive + 1 if bad else 0
        if bad and not (self.skip and self.consecutive < _MAX_SKIPPED):
            times = f" and has not been finite for {self.consecutive} steps" if self.consecutive > 1 else ""
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
        """Returns the mean of each metric, the latest value of scheduled ones, and the number of skipped steps."""
        means = {name: total / self.steps for name, total in self.sums.items()} | self.scheduled
        return means | ({"skipped": self.skipped} if self.skipped else {})

    def clear(self) -> None:
        self.sums, self.scheduled, self.steps, self.skipped = {}, {}, 0, 0

    def state(self) -> dict[str, object]:
        """Returns a copy of the state: it is written in the background, while the next steps are added."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "skip"}


# ---- Records: JSON lines, TensorBoard, Weights & Biases; lines on the console.


class MetricsLog:
    """Writes records to JSON lines, TensorBoard and Weights & Biases; only the first process does.

    If the workdir is on an object store, whose files cannot be appended to, they are kept in a local folder and copied
    there from time to time.

    Args:
      first_step: the step that the run starts from; records of later steps, which the resumed run repeats, are dropped.
    """

    def __init__(self, workdir: epath.Path, log: LogConfig, config: Mapping[str, object], first_step: int):
        self._file = self._tensorboard = self._wandb = self._remote = None
        if jax.process_index() != 0:
            return
        self._folder = workdir
        if is_remote(workdir):
            self._remote, self._copied = workdir, time.monotonic()
            self._folder = epath.Path(tempfile.mkdtemp(prefix="dlm_jax-logs-"))
            if (workdir / METRICS_FILE).exists():
                (self._folder / METRICS_FILE).write_text((workdir / METRICS_FILE).read_text())
        # A run that died before its first checkpoint starts over, with its validation at step 0.
        truncate_records(self._folder / METRICS_FILE, first_step or -1)
        self._file = open(self._folder / METRICS_FILE, "a", buffering=1)  # noqa: SIM115
        if log.tensorboard:
            from tensorboardX import SummaryWriter

            self._tensorboard = SummaryWriter(str(self._folder / "tensorboard"), purge_step=first_step + 1)
        if log.wandb:
            self._wandb = _wandb_run(log.wandb, self._folder, workdir.name, config)

    def write(self, step: int, kind: str, values: Mapping[str, float | str]) -> None:
        """Writes one record; `kind` is "train", or a hook's.

        Raises:
          TrainingError: it cannot be written.
        """
        if self._file is None:
            return
        try:
            self._file.write(json.dumps({"step": step, "kind": kind, **values}) + "\n")
        except OSError as error:
            raise TrainingError(f"{self._folder / METRICS_FILE} cannot be written ({error.strerror}); free some space, "
                                "and the same command resumes from the last checkpoint") from error
        if self._tensorboard is not None:
            for name, value in values.items():
                add = self._tensorboard.add_text if isinstance(value, str) else self._tensorboard.add_scalar
                add(f"{kind}/{name}", value, step)
        if self._wandb is not None:
            self._wandb.log({f"{kind}/{name}": value for name, value in values.items()}, step=step)
        if self._remote is not None and time.monotonic() > self._copied + _COPY_SECONDS:
            self._copy()

    def close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # `write` has reported it
                self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
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
    kept = [json.dumps(record) + "\n" for record in _parse_records(path) if record["step"] <= last_step]
    temporary = path.with_suffix(".jsonl.new")
    temporary.write_text("".join(kept))
    os.replace(temporary, path)


def read_records(workdir: epath.Path, kind: str | None = None) -> list[dict]:
    """Returns the records of a run, in order; those of one kind without the key `kind`."""
    path = workdir / METRICS_FILE
    records = _parse_records(path) if path.exists() else []
    if kind is None:
        return records
    return [record for record in records if record.pop("kind") == kind]


def _parse_records(path: epath.Path) -> list[dict]:
    """Returns all records but an incomplete last one: it is being written, or was when the run died."""
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1]]


def _wandb_run(project: str, folder: epath.Path, name: str, config: Mapping[str, object]) -> object:
    try:
        import wandb
    except ImportError:
        raise ConfigError("log.wandb needs the package wandb; install it, or remove log.wandb") from None
    return wandb.init(project=project, name=name, id=name, resume="allow", dir=str(folder), config=dict(config))


class Console:
    """Lines for people, above a progress bar on a terminal."""

    def __init__(self, total: int, done: int):
        self._show = jax.process_index() == 0
        self._bar = tqdm(total=total, initial=done, unit="step", disable=not (self._show and sys.stderr.isatty()),
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
