"""The training loop: sets a run up or takes it up again, and drives the step."""

import contextlib
import dataclasses
import functools
import math
import time

import jax
from etils import epath
from flax import nnx

from dlm_jax.checkpoints.orbax import CheckpointWriter, best_step, restore_latest, restore_state, saved_steps
from dlm_jax.checkpoints.workdir import read_run_config, write_run_metadata
from dlm_jax.data.corpus import load_rows
from dlm_jax.data.loader import Loader
from dlm_jax.models import split_trainable
from dlm_jax.parallel import make_global_batch, make_mesh
from dlm_jax.storage import ensure_accessible, write_json
from dlm_jax.training.answers import GenerationEval
from dlm_jax.training.config import TrainConfig, config_changes, flat_dict
from dlm_jax.training.metrics import (
    Clock,
    Console,
    MetricAccumulator,
    MetricsLog,
    peak_flops,
    read_records,
    train_flops,
)
from dlm_jax.training.optimizer import make_optimizer
from dlm_jax.training.profile import Profile, peak_memory_gib
from dlm_jax.training.samples import sample_text
from dlm_jax.training.signals import StopRequest, stop_requests
from dlm_jax.training.start import (
    check_data,
    dataset_fingerprint,
    load_base,
    resolve_adapter,
    rows_folder,
    summary_lines,
)
from dlm_jax.training.step import Metrics, create_state, make_train_step, state_layout
from dlm_jax.training.validation import Validation

_OUTLIER = 4  # times the mean of its record: a step that slow is shown


def train(config: TrainConfig, workdir: epath.PathLike) -> dict[str, object]:
    """Runs `config` in `workdir`, from its latest checkpoint if it has one.

    Returns:
      A summary: `workdir`, `step`, `tokens`, `seconds`, `interrupted` (the signal's name, or None), the last `train`,
      `validation` and `answers` metrics, the `best_step` by validation, the `changes` of settings against the run that
      was resumed, and `goodput` and `seconds_by_kind` over all starts of the run (see `clock`).

    Raises:
      ConfigError, CheckpointError, DataError: the run cannot be set up.
      TrainingError: the loss or the gradient is not finite.
    """
    workdir = ensure_accessible(workdir)
    if config.compilation_cache is not None:
        jax.config.update("jax_compilation_cache_dir", config.compilation_cache)
    if config.num_steps <= (taken := max(saved_steps(workdir), default=0)):
        return _finished(config, workdir, taken)
    with contextlib.ExitStack() as stack:
        return _Run(config, workdir, stack).drive(stack.enter_context(stop_requests()))


class _Run:
    """One call of `train`: what stays the same (programs, data, places to report to), and how far it has come."""

    def __init__(self, config: TrainConfig, workdir: epath.Path, stack: contextlib.ExitStack):
        self.config, self.workdir, self.clock = config, workdir, Clock()
        workdir.mkdir(parents=True, exist_ok=True)
        self.mesh = make_mesh(config.mesh)
        stack.enter_context(jax.set_mesh(self.mesh))  # for what is split by hand, inside the model
        self.first, damaged = restore_latest(workdir)
        self.changes = config_changes(read_run_config(workdir), config) if self.first else []
        base = load_base(config, workdir, self.mesh, resumed=bool(self.first))
        graphdef, params, frozen = split_trainable(base.model)
        # From here on the parameters live in the state; of the model only the shape is kept.
        self.base = dataclasses.replace(base, model=nnx.eval_shape(lambda: base.model))

        sources, held_out = load_rows(config.data, self.base.tokenizer,
                                      vocab_size=self.base.model.config.vocab_size, cache_dir=rows_folder(workdir))
        batch_size = config.data.batch_size
        loader = Loader(sources, batch_size, weights=config.data.weights, seed=config.seed,
                        random_length=config.data.random_length)
        self.batches = loader.batches(self.first, lambda read: make_global_batch(read, batch_size, self.mesh))
        stack.callback(self.batches.close)
        self.validation = None
        if config.validation.every and held_out is not None:
            self.validation = Validation(
                graphdef, held_out, self.mesh, num_rows=config.validation.num_rows,
                num_samples=config.validation.num_samples, batch_size=batch_size // config.optimizer.accumulate_steps,
                objective=config.objective, seed=config.seed, mask_token_id=self.base.mask_token_id)

        self.answers = GenerationEval(self.base, held_out, self.mesh, config) if config.validation.generation_eval else None

        optimizer, ema = make_optimizer(config.optimizer, config.num_steps), config.optimizer.ema_decay > 0
        self.train_step_of = functools.cache(functools.partial(
            make_train_step, graphdef, optimizer, self.mesh, config=config.optimizer, num_steps=config.num_steps,
            seed=config.seed, mask_token_id=self.base.mask_token_id))
        self.dataset_fingerprint, progress = dataset_fingerprint(sources), {}
        if self.first:
            layout = state_layout(params, optimizer, ema, self.mesh, config.optimizer.offload, frozen)
            self.state, progress = restore_state(workdir, self.first, layout, frozen)
            check_data(workdir, progress["data"], self.dataset_fingerprint)
        else:
            self.state = create_state(params, optimizer, ema, self.mesh, config.optimizer.offload, frozen)
        adapter = resolve_adapter(config, workdir, self.base, self.state.frozen, bool(self.first))
        write_run_metadata(workdir, flat_dict(config), self.base, adapter)
        self.checkpoints = CheckpointWriter(workdir, keep=config.checkpoint.keep,
                                            keep_best=config.checkpoint.keep_best)
        stack.callback(self.checkpoints.close)

        self.clock.add(progress.get("seconds", {}))
        self.clock.add({"lost": lost_seconds(workdir, self.first)})
        self.profile = Profile(workdir, config.log.profile)
        stack.callback(self.profile.close)
        self.accumulator = MetricAccumulator(config.optimizer.on_nonfinite == "skip", **progress.get("window", {}))
        self.log = MetricsLog(workdir, config.log, flat_dict(config), self.first)
        stack.callback(self.log.close)
        self.last = last_records(workdir)
        self.console = Console(config.num_steps, self.first)
        stack.callback(self.console.close)
        for line in summary_lines(config, self.base, self.mesh, self.first, self.changes, damaged):
            self.console.line(line)

    def drive(self, request: StopRequest) -> dict[str, object]:
        """Takes the steps that are left."""
        config, began, step, stop = self.config, time.monotonic(), self.first, None
        pending: tuple[int, Metrics] | None = None
        if not self.first:
            self.validate(0)
        self.clock.switch("compiling")
        while step < config.num_steps and not stop:
            with self.clock.doing("data"):
                batch = next(self.batches)
            self.profile.before(step + 1)
            # One program, but for objectives that change their shape on the way: blocks that grow.
            self.state, metrics = self.train_step_of(objective=config.objective.at_step(step))(self.state, batch)
            if pending:
                self.log_metrics(*pending)  # the step before: the device has its next work while this waits
            step += 1
            pending = step, metrics
            if self.profile.after(step, self.state):
                self.console.line(f"step {step:>7}  trace written to {self.workdir / 'profile'}")
            stop = request.at(step)
            validate = step == config.num_steps or self.due(step, config.validation.every)
            save = step == config.num_steps or bool(stop) or self.due(step, config.checkpoint.every)
            validate |= save and config.checkpoint.keep_best and not stop
            sample = self.due(step, config.log.sample_every)
            if validate or save or sample:
                self.log_metrics(*pending)
                pending = None
                value = self.validate(step) if validate else None
                if save:
                    self.save(step, value)
                if sample:
                    self.sample(step)
        with self.clock.doing("saving"):
            self.checkpoints.wait()
        self.console.line(f"time       {self.clock.line()}")
        if stop:
            self.console.line(f"stopped by {stop} after step {step}; the same command goes on from there")
        return self.summary(step, time.monotonic() - began, stop)

    @staticmethod
    def due(step: int, every: int) -> bool:
        return every > 0 and step % every == 0

    def log_metrics(self, step: int, metrics: Metrics) -> None:
        """Takes in the metrics of a step and, every so often, records the mean of what has been taken in."""
        metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self.accumulator.add(step, metrics)
        if step == self.first + 1:
            self.clock.switch("steps")  # the first compiled the program, which is no measure of speed
        else:
            self.clock.count(metrics["masked_tokens"])
        self.console.step(metrics["loss"])
        if not self.due(step, self.config.log.every) and step != self.config.num_steps:
            return
        means = self.accumulator.means() | self.rates(step)
        if self.due(step, self.config.log.every):
            self.accumulator.clear()
        self.last["train"] = {"step": step, **means}
        self.log.write(step, "train", means)
        self.console.line(_step_line(step, means))

    def rates(self, step: int) -> dict[str, float]:
        """At a step: speed since the last record, validation and saving left out, and memory."""
        lap, rates = self.clock.lap(), {}
        if lap["steps"]:
            tokens = lap["steps"] * self.config.data.batch_size * self.config.data.length
            rates = {"tokens_per_second": tokens / lap["seconds"], "seconds_per_step": lap["seconds"] / lap["steps"],
                     "slowest_step_seconds": lap["slowest"], "data_wait": lap["waiting"] / lap["seconds"]}
            if peak := peak_flops(self.mesh.devices.flat[0]):
                model, length = self.base.model, self.config.data.length
                read = tokens * self.config.objective.at_step(step - 1).forward_multiplier(length)
                flops = train_flops(model.config, read, lap["scored"], length, model.lora)
                rates["mfu"] = flops / lap["seconds"] / (peak * self.mesh.size)
        memory = peak_memory_gib()
        return rates | ({} if memory is None else {"peak_memory_gib": memory})

    def validate(self, step: int) -> float | None:
        """Records the held-out loss, and returns the bound."""
        if self.validation is None:
            return None
        with self.clock.doing("validation"):
            values = self.validation(self.state.inference_params)
        self.last["validation"] = {"step": step, **values}
        self.log.write(step, "validation", values)
        self.console.line(f"step {step:>7}  held-out bound {values['bound']:.4f} nats per token  "
                          f"accuracy {values['accuracy']:.3f}")
        if self.answers is not None and (step == self.config.num_steps or self.due(step, self.config.validation.every)):
            self.answer(step)
        return values["bound"]

    def answer(self, step: int) -> None:
        """Records how held-out examples are answered."""
        with self.clock.doing("sampling"):
            values, text = self.answers(self.state.inference_params)
        self.last["answers"] = {"step": step, **values}
        self.log.write(step, "answers", {**values, "text": text})
        shares = "  ".join(f"{name} {value:.3f}" for name, value in values.items())
        self.console.line(f"step {step:>7}  answers  {shares}  first: {' '.join(text.split())}")

    def save(self, step: int, validation: float | None) -> None:
        finite = validation is not None and math.isfinite(validation)
        with self.clock.doing("saving"):
            progress = {"window": self.accumulator.state(), "data": self.dataset_fingerprint, "seconds": self.clock.state()}
            self.checkpoints.save(step, self.state, progress, validation if finite else None)

    def sample(self, step: int) -> None:
        with self.clock.doing("sampling"):
            text = sample_text(self.base, self.state.inference_params, length=min(self.config.data.length, 256),
                               num_steps=self.config.log.sample_steps, seed=self.config.seed)
        self.log.write(step, "sample", {"text": text})
        self.console.line(f"step {step:>7}  sample: {text}")

    def summary(self, step: int, seconds: float, interrupted: str | None) -> dict[str, object]:
        summary = _summary(self.config, self.workdir, step, self.last) | {
            "seconds": round(seconds, 1), "interrupted": interrupted, "changes": self.changes,
            "goodput": self.clock.goodput(), "seconds_by_kind": self.clock.state()}
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


def lost_seconds(workdir: epath.Path, first: int) -> float:
    """What the steps took that a run had recorded beyond the checkpoint it goes on from."""
    lost = [record for record in read_records(workdir, "train") if record["step"] > first]
    return (lost[-1]["step"] - first) * lost[-1].get("seconds_per_step", 0.0) if lost else 0.0


def last_records(workdir: epath.Path) -> dict[str, dict]:
    """The latest training and validation record."""
    found = {kind: read_records(workdir, kind) for kind in ("train", "validation", "answers")}
    return {kind: (records or [{}])[-1] for kind, records in found.items() if records or kind != "answers"}


def _step_line(step: int, means: dict[str, float]) -> str:
    """A record for people; of steps that were all skipped there are no means."""
    shown = {"loss": "{:.4f}", "bound": "{:.4f}", "accuracy": "{:.3f}", "grad_norm": "{:.2f}",
             "learning_rate": "{:.2e}", "skipped": "{}", "tokens_per_second": "{:,.0f}", "mfu": "{:.1%}",
             "peak_memory_gib": "{:.2f}"}
    names = {"grad_norm": "grad", "learning_rate": "lr", "tokens_per_second": "tokens/s", "peak_memory_gib": "GiB"}
    if means.get("slowest_step_seconds", 0) > _OUTLIER * means.get("seconds_per_step", 0):
        shown["slowest_step_seconds"], names["slowest_step_seconds"] = "{:.2f} s", "slowest step"
    parts = [f"{names.get(name, name)} {form.format(means[name])}" for name, form in shown.items() if name in means]
    return f"step {step:>7}  " + "  ".join(parts)
