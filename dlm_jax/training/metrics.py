"""Floating-point operations a step must do, and what the device could do: their ratio is the utilisation (MFU)."""

import contextlib
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
import jax.numpy as jnp
from etils import epath
from flax import nnx
from tqdm import tqdm

from dlm_jax.data.config import DataConfig
from dlm_jax.errors import ConfigError, TrainingError
from dlm_jax.models import LoRAConfig, LoRAFactor, ModelConfig, abstract_model
from dlm_jax.parallel.chips import find_chip
from dlm_jax.storage import is_remote, upload
from dlm_jax.training.config import LogConfig


def peak_flops(device: jax.Device) -> float | None:
    """The device's dense bfloat16 peak, FLOP/s, or None where it is not known (CPUs among them)."""
    chip = find_chip(device)
    return chip and chip.flops


def count_params(config: ModelConfig, part: str | None = None) -> int:
    """Parameters of the model, or of one of its parts, such as "blocks"."""
    model = abstract_model(config)
    leaves = jax.tree.leaves(nnx.state(model if part is None else getattr(model, part)))
    return sum(math.prod(leaf.shape) for leaf in leaves)


def count_factors(config: ModelConfig, lora: LoRAConfig) -> int:
    """Parameters of LoRA's factors."""
    factors = nnx.state(abstract_model(config, lora=lora), LoRAFactor)
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(factors))


def train_flops(config: ModelConfig, tokens: float, scored: float, length: int,
                lora: LoRAConfig | None = None) -> float:
    """FLOPs of a forward and a backward pass over `tokens` tokens in rows of `length`, `scored` of them scored.

    6 x (parameters of the blocks) x tokens, for their matrix products;
    + 12 x layers x heads x head_dim x length x tokens, for attention over the whole square (no causal half);
    + 6 x hidden x vocabulary x scored, for the head, needed only where a token is scored.
    What is computed again (remat, chunked loss) does not count. With LoRA, matrices that are not trained have 4 in
    place of 6, as they have no gradient of their own, and the factors are added.
    """
    frozen, head = (6, 6) if lora is None else (4, 6 if lora.head or (lora.embedding and config.tie_embeddings) else 4)
    blocks = frozen * count_params(config, "blocks") * tokens
    if lora is not None:
        blocks += 6 * count_factors(config, lora) * tokens
    attention = 12 * config.num_layers * config.num_heads * config.head_dim * length * tokens
    return blocks + attention + head * config.hidden_size * config.vocab_size * scored


_USUAL_SHARE = 0.3  # of the peak, or of a large matrix product's speed, that a training step reaches


def step_seconds(config: ModelConfig, data: DataConfig) -> float:
    """A rough forecast of the seconds a step takes on the devices at hand, before anything is compiled."""
    tokens = data.batch_size * data.length
    peak = peak_flops(jax.devices()[0])
    speed = peak * jax.device_count() if peak else measured_flops()
    return train_flops(config, tokens, tokens / 2, data.length) / (_USUAL_SHARE * speed)


def measured_flops(size: int = 1024, repeats: int = 4) -> float:
    """FLOP/s of a float32 matrix product of this size on the default device."""
    product, matrix = jax.jit(jnp.matmul), jnp.ones((size, size), jnp.float32)
    product(matrix, matrix).block_until_ready()
    began = time.perf_counter()
    for _ in range(repeats):
        product(matrix, matrix).block_until_ready()
    return repeats * 2 * size**3 / (time.perf_counter() - began)


# ---- Where the time of a run goes, over all its starts.


# What a run can be doing. Only "steps" is what it is there for; "lost" was spent on steps after the last checkpoint.
KINDS = ("start", "compiling", "steps", "data", "validation", "saving", "sampling", "lost")
_TRAINING = ("steps", "data")


class Clock:
    """Adds up seconds by kind, and counts steps and scored tokens between records."""

    def __init__(self) -> None:
        self.spent = dict.fromkeys(KINDS, 0.0)
        self._kind, self._since = "start", time.monotonic()
        self._begin_lap()

    def add(self, spent: Mapping[str, float]) -> None:
        """Counts in what starts before have spent, as `state` gave it."""
        for kind, seconds in spent.items():
            self.spent[kind] += seconds
        self._begin_lap()

    @contextlib.contextmanager
    def doing(self, kind: str) -> Iterator[None]:
        """Time inside counts as `kind`."""
        before = self._kind
        self.switch(kind)
        yield
        self.switch(before)

    def switch(self, kind: str) -> None:
        """From now on time counts as `kind`."""
        now = time.monotonic()
        self.spent[self._kind] += now - self._since
        self._kind, self._since = kind, now

    def count(self, scored: float) -> None:
        """A step's results are here."""
        self.switch(self._kind)
        now = self._training()
        self._steps, self._scored = self._steps + 1, self._scored + scored
        self._slowest, self._last = max(self._slowest, now - self._last), now

    def lap(self) -> dict[str, float]:
        """Since the last lap: `steps`, `scored` tokens, `seconds` of training, of which `waiting` for data, and those
        of the `slowest` step."""
        self.switch(self._kind)
        lap = {"steps": self._steps, "scored": self._scored, "seconds": max(self._training() - self._began, 1e-9),
               "waiting": self.spent["data"] - self._waited, "slowest": self._slowest}
        self._begin_lap()
        return lap

    def state(self) -> dict[str, float]:
        self.switch(self._kind)
        return dict(self.spent)

    def goodput(self) -> float:
        """The share of all time that went into steps that count."""
        spent = self.state()
        return spent["steps"] / max(sum(spent.values()), 1e-9)

    def line(self) -> str:
        """For people: the shares of all kinds that took at least a thousandth."""
        spent = self.state()
        total = max(sum(spent.values()), 1e-9)
        shares = sorted(((seconds / total, kind) for kind, seconds in spent.items()), reverse=True)
        return ", ".join(f"{kind} {share:.1%}" for share, kind in shares if share >= 1e-3)

    def _training(self) -> float:
        return sum(self.spent[kind] for kind in _TRAINING)

    def _begin_lap(self) -> None:
        self._steps, self._scored, self._slowest = 0, 0.0, 0.0
        self._began = self._last = self._training()
        self._waited = self.spent["data"]


# ---- What a run reports: one JSON line a record, TensorBoard and Weights & Biases beside it, a line on the console.


METRICS = "metrics.jsonl"
_COPY_SECONDS = 30
_SCHEDULED = ("learning_rate", "anneal_ratio")
_MOST_SKIPPED = 20  # steps in a row: then it is no accident


class MetricAccumulator:
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
