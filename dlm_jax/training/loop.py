"""The training loop: takes the steps of a run, calls its hooks, and reports."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator, Sequence

import jax
from etils import epath

from dlm_jax.checkpoints.orbax import best_step, saved_steps
from dlm_jax.checkpoints.workdir import read_run_config
from dlm_jax.parallel import preemption_requested
from dlm_jax.storage import ensure_accessible, write_json
from dlm_jax.training.config import TrainConfig, config_changes
from dlm_jax.training.flops import peak_flops, peak_memory_gib, teacher_flops, train_flops
from dlm_jax.training.hooks import Hook, HookFactory, make_hooks
from dlm_jax.training.recorded import settle_resumed
from dlm_jax.training.setup import Run, latest_records, open_run
from dlm_jax.training.state import Metrics

_OUTLIER = 4  # a step that takes this many times the mean is shown


def train(config: TrainConfig, workdir: epath.PathLike, hooks: Sequence[HookFactory] = ()) -> dict[str, object]:
    """Runs `config` in `workdir`, from its latest checkpoint if it has one.

    Args:
      hooks: what the run does besides what its config asks for; see `hooks`.

    Returns:
      A summary: `workdir`, `step`, `tokens`, `seconds`, `interrupted` (the signal's name, or None), the last record of
      each kind (`train`, `validation`, ...), the `best_step` by validation, the `changes` of settings against the run
      that was resumed, and `goodput` and `seconds_by_category` over all starts of the run (see `metrics.CATEGORIES`).

    Raises:
      ConfigError, CheckpointError, DataError: the run cannot be set up.
      TrainingError: the loss or the gradient is not finite.
    """
    workdir = ensure_accessible(workdir)
    if config.compilation_cache is not None:
        jax.config.update("jax_compilation_cache_dir", config.compilation_cache)
    if config.num_steps <= (taken := max(saved_steps(workdir), default=0)):
        config_changes(saved := read_run_config(workdir), settle_resumed(config, saved))
        if jax.process_index() == 0:
            print(f"{workdir} has taken its {taken} steps; raise num_steps to continue")
        return _summary(config, workdir, taken, latest_records(workdir))
    with contextlib.ExitStack() as stack:
        run = open_run(config, workdir, stack)
        run_hooks = make_hooks(run, hooks)
        for line in run.summary_lines:
            run.console.line(line)
        return take_steps(run, run_hooks, stack.enter_context(stop_requests()))


def take_steps(run: Run, hooks: Sequence[Hook], stop: "StopRequest") -> dict[str, object]:
    """Takes the remaining steps, and returns the summary of the run."""
    config, start, step = run.config, time.monotonic(), run.first_step
    pending: tuple[int, Metrics] | None = None
    _call_due(run, hooks, step)
    run.clock.switch("compilation")
    while step < config.num_steps and run.stop_signal is None:
        with run.clock.measure("data_stall"):
            batch = next(run.batches)
        # The same program at every step, except for objectives that change shape on the way: growing blocks.
        run.state, metrics = run.make_step(objective=config.objective.at_step(step))(run.state, batch)
        if pending:
            log_metrics(run, *pending)  # of the step before: the device computes this one meanwhile
        step += 1
        pending = step, metrics
        run.stop_signal = stop.at_step(step)
        if any(hook.is_due(run, step) for hook in hooks):
            log_metrics(run, *pending)
            pending = None
            _call_due(run, hooks, step)
    run.console.line(f"time       {run.clock.line()}")
    if run.stop_signal:
        run.console.line(f"stopped by {run.stop_signal} after step {step}; the same command resumes from there")
    summary = _summary(config, run.workdir, step, run.latest) | {
        "seconds": round(time.monotonic() - start, 1), "interrupted": run.stop_signal, "changes": run.changes,
        "goodput": run.clock.goodput(), "seconds_by_category": run.clock.seconds()}
    if jax.process_index() == 0:
        write_json(run.workdir / "summary.json", summary)
    return summary


def _call_due(run: Run, hooks: Sequence[Hook], step: int) -> None:
    for hook in hooks:
        if hook.is_due(run, step):
            hook(run, step)


def log_metrics(run: Run, step: int, metrics: Metrics) -> None:
    """Fetches the metrics of a step, and every `log.every` steps records their means.

    Raises:
      TrainingError: the loss or the gradient is not finite.
    """
    metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
    run.accumulator.add(step, metrics)
    if step == run.first_step + 1:
        run.clock.switch("steps")  # the first step compiled the program: it does not count as a step
    else:
        run.clock.count_step(metrics["masked_tokens"])
    run.console.step(metrics["loss"])
    is_due = step % run.config.log.every == 0
    if is_due or step == run.config.num_steps:
        means = run.accumulator.means() | _throughput(run, step)
        if is_due:
            run.accumulator.clear()
        run.record(step, "train", means, _format_means(means))


def _throughput(run: Run, step: int) -> dict[str, float]:
    """Returns speed since the last record, hooks excluded, and peak memory."""
    interval, values, data = run.clock.end_interval(), {}, run.config.data
    if interval["steps"]:
        seconds = interval["seconds"]
        tokens = interval["steps"] * data.batch_size * data.length
        values = {"tokens_per_second": tokens / seconds, "seconds_per_step": seconds / interval["steps"],
                  "slowest_step_seconds": interval["slowest"], "data_stall": interval["data_stall"] / seconds}
        # What training of drafts computes is not counted.
        if not run.config.objective.trains_drafts and (peak := peak_flops(run.mesh.devices.flat[0])):
            model, objective = run.base.model, run.config.objective.at_step(step - 1)
            passes = objective.forward_multiplier(data.length)
            scored = interval["scored"] + (tokens if objective.clean_weight else 0)
            flops = train_flops(model.config, tokens * passes, scored, data.length, model.lora,
                                tokens * objective.num_views)
            flops += teacher_flops(model.config, objective, tokens, interval["scored"], data.length, model.lora)
            values["mfu"] = flops / seconds / (peak * run.mesh.size)
    memory = peak_memory_gib()
    return values | ({} if memory is None else {"peak_memory_gib": memory})


def _format_means(means: dict[str, float]) -> str:
    """Returns a record for people; if all steps were skipped, there are no means."""
    formats = {"loss": "{:.4f}", "bound": "{:.4f}", "clean_nll": "{:.4f}", "kl": "{:.4f}", "tv": "{:.4f}",
               "hidden_distance": "{:.4f}", "accuracy": "{:.3f}", "tokens_per_pass": "{:.3f}",
               "grad_norm": "{:.2f}", "learning_rate": "{:.2e}", "skipped": "{}", "tokens_per_second": "{:,.0f}",
               "mfu": "{:.1%}", "peak_memory_gib": "{:.2f}"}
    names = {"clean_nll": "AR", "hidden_distance": "distance", "grad_norm": "grad", "learning_rate": "lr",
             "tokens_per_second": "tokens/s", "peak_memory_gib": "GiB"}
    if means.get("slowest_step_seconds", 0) > _OUTLIER * means.get("seconds_per_step", 0):
        formats["slowest_step_seconds"], names["slowest_step_seconds"] = "{:.2f} s", "slowest step"
    return "  ".join(f"{names.get(name, name)} {template.format(means[name])}"
                     for name, template in formats.items() if name in means)


def _summary(config: TrainConfig, workdir: epath.Path, step: int, latest: dict[str, dict]) -> dict[str, object]:
    return {"workdir": str(workdir), "step": step, "tokens": step * config.data.batch_size * config.data.length,
            "seconds": 0.0, "interrupted": None, **latest, "best_step": best_step(workdir), "changes": []}


class StopRequest:
    """Says after each step whether to stop."""

    def __init__(self) -> None:
        self.name: str | None = None

    def at_step(self, step: int) -> str | None:
        """Returns the name of the signal that stops the run after this step; the same in all processes of a run."""
        if jax.process_count() > 1 and preemption_requested(step):
            self.name = "SIGTERM"
        return self.name


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Turns the first SIGTERM or Ctrl-C into a request to save and stop; a second Ctrl-C interrupts at once.

    Works in the main thread only; elsewhere it does nothing. With several processes JAX's runtime handles the signals,
    and informs all processes of a SIGTERM to one of them.
    """
    request, before = StopRequest(), {}

    def handle(number: int, frame: object) -> None:
        if request.name is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        request.name = signal.Signals(number).name

    if threading.current_thread() is threading.main_thread() and jax.process_count() == 1:
        before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
