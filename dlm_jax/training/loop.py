"""The training loop: sets a run up or takes it up again, and drives the step."""

import contextlib
import dataclasses
import math
import time

import jax
from etils import epath
from flax import nnx

from dlm_jax.data.corpus import load_rows
from dlm_jax.data.loader import Loader
from dlm_jax.parallel import make_mesh, place_rows
from dlm_jax.training.checkpoint import CheckpointWriter, best_step, restore_state, saved_steps, take_up
from dlm_jax.training.config import TrainConfig, config_changes, flat_dict
from dlm_jax.training.flops import peak_flops, train_flops
from dlm_jax.training.metrics import Console, MetricsLog, Window, read_records
from dlm_jax.training.optimizer import make_optimizer
from dlm_jax.training.samples import sample_text
from dlm_jax.training.signals import StopRequest, stop_requests
from dlm_jax.training.start import check_data, data_mark, load_base, summary_lines
from dlm_jax.training.state import create_state, state_layout
from dlm_jax.training.step import Metrics, make_train_step
from dlm_jax.training.validation import Validation
from dlm_jax.training.workdir import describe_run, read_run_config, write_json


def train(config: TrainConfig, workdir: epath.PathLike) -> dict[str, object]:
    """Runs `config` in `workdir`, from its latest checkpoint if it has one.

    Returns:
      A summary: `workdir`, `step`, `tokens`, `seconds`, `interrupted` (the signal's name, or None), the last `train`
      and `validation` metrics, the `best_step` by validation, and the `changes` of settings against the run that was
      resumed.

    Raises:
      ConfigError, CheckpointError, DataError: the run cannot be set up.
      TrainingError: the loss or the gradient is not finite.
    """
    workdir = epath.Path(workdir)
    if config.num_steps <= (taken := max(saved_steps(workdir), default=0)):
        return _finished(config, workdir, taken)
    with contextlib.ExitStack() as stack:
        return _Run(config, workdir, stack).drive(stack.enter_context(stop_requests()))


class _Run:
    """One call of `train`: what stays the same (programs, data, places to report to), and how far it has come."""

    def __init__(self, config: TrainConfig, workdir: epath.Path, stack: contextlib.ExitStack):
        self.config, self.workdir = config, workdir
        workdir.mkdir(parents=True, exist_ok=True)
        self.mesh = make_mesh(config.mesh)
        stack.enter_context(jax.set_mesh(self.mesh))  # for what is split by hand, inside the model
        self.first, damaged = take_up(workdir)
        self.changes = config_changes(read_run_config(workdir), config) if self.first else []
        base = load_base(config, workdir, self.mesh, resumed=bool(self.first))
        graphdef, params = nnx.split(base.model)
        # From here on the parameters live in the state; of the model only the shape is kept.
        self.base = dataclasses.replace(base, model=nnx.eval_shape(lambda: base.model))

        sources, held_out = load_rows(config.data, self.base.tokenizer,
                                      vocab_size=self.base.model.config.vocab_size, cache_dir=workdir / "data")
        batch_size = config.data.batch_size
        loader = Loader(sources, batch_size, weights=config.data.weights, seed=config.seed,
                        random_length=config.data.random_length)
        self.batches = loader.batches(self.first, lambda read: place_rows(read, batch_size, self.mesh))
        stack.callback(self.batches.close)
        self.validation = None
        if config.validation.every and held_out is not None:
            self.validation = Validation(
                graphdef, held_out, self.mesh, num_rows=config.validation.num_rows,
                num_samples=config.validation.num_samples, batch_size=batch_size // config.optimizer.accumulate_steps,
                objective=config.objective, seed=config.seed, mask_token_id=self.base.mask_token_id)

        optimizer, ema = make_optimizer(config.optimizer, config.num_steps), config.optimizer.ema_decay > 0
        self.train_step = make_train_step(
            graphdef, optimizer, self.mesh, objective=config.objective, config=config.optimizer,
            num_steps=config.num_steps, seed=config.seed, mask_token_id=self.base.mask_token_id)
        self.data_mark, progress = data_mark(sources), {}
        if self.first:
            layout = state_layout(params, optimizer, ema, self.mesh)
            self.state, progress = restore_state(workdir, self.first, layout)
            check_data(workdir, progress["data"], self.data_mark)
        else:
            self.state = create_state(params, optimizer, ema, self.mesh)
        describe_run(workdir, config, self.base)
        self.checkpoints = CheckpointWriter(workdir, keep=config.checkpoint.keep,
                                            keep_best=config.checkpoint.keep_best)
        stack.callback(self.checkpoints.close)

        self.window = Window(config.optimizer.nonfinite == "skip", **progress.get("window", {}))
        self.log = MetricsLog(workdir, config.log, flat_dict(config), self.first)
        stack.callback(self.log.close)
        self.last = last_records(workdir)
        self.console = Console(config.num_steps, self.first)
        stack.callback(self.console.close)
        self.clock = _Clock()
        for line in summary_lines(config, self.base, self.mesh, self.first, self.changes, damaged):
            self.console.line(line)

    def drive(self, request: StopRequest) -> dict[str, object]:
        """Takes the steps that are left."""
        config, began, step, stop = self.config, time.monotonic(), self.first, None
        pending: tuple[int, Metrics] | None = None
        if not self.first:
            self.validate(0)
        while step < config.num_steps and not stop:
            self.state, metrics = self.train_step(self.state, next(self.batches))
            if pending:
                self.absorb(*pending)  # the step before: the device has its next work while this waits
            step += 1
            pending = step, metrics
            stop = request.at(step)
            validate = step == config.num_steps or self.due(step, config.validation.every)
            save = step == config.num_steps or bool(stop) or self.due(step, config.checkpoint.every)
            validate |= save and config.checkpoint.keep_best and not stop
            sample = self.due(step, config.log.sample_every)
            if validate or save or sample:
                self.absorb(*pending)
                pending = None
                with self.clock.paused():
                    value = self.validate(step) if validate else None
                    if save:
                        self.save(step, value)
                    if sample:
                        self.sample(step)
        self.checkpoints.wait()
        if stop:
            self.console.line(f"stopped by {stop} after step {step}; the same command goes on from there")
        return self.summary(step, time.monotonic() - began, stop)

    @staticmethod
    def due(step: int, every: int) -> bool:
        return every > 0 and step % every == 0

    def absorb(self, step: int, metrics: Metrics) -> None:
        """Takes in the metrics of a step and, every so often, records the mean of what has been taken in."""
        metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self.window.add(step, metrics)
        if step == self.first + 1:
            self.clock.restart()  # the first step compiled the program, which is no measure of speed
        else:
            self.clock.count(metrics["masked_tokens"])
        self.console.step(metrics["loss"])
        if not self.due(step, self.config.log.every) and step != self.config.num_steps:
            return
        means = self.window.means() | self.rates()
        if self.due(step, self.config.log.every):
            self.window.clear()
        self.last["train"] = {"step": step, **means}
        self.log.write(step, "train", means)
        self.console.line(_step_line(step, means))

    def rates(self) -> dict[str, float]:
        """Speed since the last record, validation and saving left out."""
        steps, scored, seconds = self.clock.lap()
        if not steps:
            return {}
        tokens = steps * self.config.data.batch_size * self.config.data.length
        rates = {"tokens_per_second": tokens / seconds, "seconds_per_step": seconds / steps}
        peak = peak_flops(self.mesh.devices.flat[0])
        if peak:
            flops = train_flops(self.base.model.config, tokens, scored, self.config.data.length)
            rates["mfu"] = flops / seconds / (peak * self.mesh.size)
        return rates

    def validate(self, step: int) -> float | None:
        """Records the held-out loss, and returns the bound."""
        if self.validation is None:
            return None
        values = self.validation(self.state.inference_params)
        self.last["validation"] = {"step": step, **values}
        self.log.write(step, "validation", values)
        self.console.line(f"step {step:>7}  held-out bound {values['bound']:.4f} nats per token  "
                          f"accuracy {values['accuracy']:.3f}")
        return values["bound"]

    def save(self, step: int, validation: float | None) -> None:
        finite = validation is not None and math.isfinite(validation)
        progress = {"window": self.window.state(), "data": self.data_mark}
        self.checkpoints.save(step, self.state, progress, validation if finite else None)

    def sample(self, step: int) -> None:
        text = sample_text(self.base, self.state.inference_params, length=min(self.config.data.length, 256),
                           num_steps=self.config.log.sample_steps, seed=self.config.seed)
        self.log.write(step, "sample", {"text": text})
        self.console.line(f"step {step:>7}  sample: {text}")

    def summary(self, step: int, seconds: float, interrupted: str | None) -> dict[str, object]:
        summary = _summary(self.config, self.workdir, step, self.last) | {
            "seconds": round(seconds, 1), "interrupted": interrupted, "changes": self.changes}
        if jax.process_index() == 0:
            write_json(self.workdir / "summary.json", summary)
        return summary


def _summary(config: TrainConfig, workdir: epath.Path, step: int, last: dict[str, dict]) -> dict[str, object]:
    return {"workdir": str(workdir), "step": step, "tokens": step * config.data.batch_size * config.data.length,
            "seconds": 0.0, "interrupted": None, **last, "best_step": best_step(workdir), "changes": []}


def _finished(config: TrainConfig, workdir: epath.Path, step: int) -> dict[str, object]:
    """Says that the run has nothing left to do."""
    config_changes(read_run_config(workdir), config)
    if jax.process_index() == 0:
        print(f"{workdir} has taken its {step} steps; raise num_steps to go on")
    return _summary(config, workdir, step, last_records(workdir))


def last_records(workdir: epath.Path) -> dict[str, dict]:
    """The latest training and validation record."""
    return {kind: (read_records(workdir, kind) or [{}])[-1] for kind in ("train", "validation")}


def _step_line(step: int, means: dict[str, float]) -> str:
    """A record for people; of steps that were all skipped there are no means."""
    shown = {"loss": "{:.4f}", "bound": "{:.4f}", "accuracy": "{:.3f}", "grad_norm": "{:.2f}",
             "learning_rate": "{:.2e}", "skipped": "{}", "tokens_per_second": "{:,.0f}", "mfu": "{:.1%}"}
    names = {"grad_norm": "grad", "learning_rate": "lr", "tokens_per_second": "tokens/s"}
    parts = [f"{names.get(name, name)} {form.format(means[name])}" for name, form in shown.items() if name in means]
    return f"step {step:>7}  " + "  ".join(parts)


class _Clock:
    """Counts steps and scored tokens against time, pauses left out."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self._steps, self._scored, self._since = 0, 0.0, time.monotonic()

    def count(self, scored: float) -> None:
        self._steps += 1
        self._scored += scored

    @contextlib.contextmanager
    def paused(self):
        began = time.monotonic()
        yield
        self._since += time.monotonic() - began

    def lap(self) -> tuple[int, float, float]:
        """Steps, scored tokens and seconds since the last lap."""
        lap = self._steps, self._scored, max(time.monotonic() - self._since, 1e-9)
        self.restart()
        return lap
