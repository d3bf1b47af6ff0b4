"""What a run does besides its steps: validation, sampled texts, checkpoints, a profile.

A hook is due after certain steps, and is then called with the run. `PeriodicEval` makes a hook of any function of the
parameters, such as the generated answers of `evaluation.generation_eval`, which training does not know.
"""

import dataclasses
import functools
import math
import operator
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from dlm_jax.checkpoints.orbax import CheckpointWriter
from dlm_jax.data.loader import Loader
from dlm_jax.data.rows import RowSource
from dlm_jax.data.tokenization import start_token
from dlm_jax.diffusion import Batch, DraftSums, ObjectiveConfig
from dlm_jax.errors import ConfigError
from dlm_jax.matmul import MatmulKind
from dlm_jax.parallel import make_global_batch
from dlm_jax.random import example_keys
from dlm_jax.sampling import SamplerConfig, SamplingSpec, sample
from dlm_jax.storage import is_remote, upload
from dlm_jax.training.diffusion_loss import metrics_from_sums
from dlm_jax.training.setup import Run
from dlm_jax.training.step import make_eval_step

_SAMPLE_LENGTH = 256  # tokens of a sampled text, at most


class Hook(Protocol):
    """Something that a run does after some of its steps."""

    def is_due(self, run: Run, step: int) -> bool:
        """Returns whether to call the hook after `step` steps; before the first step, `step` is `run.first_step`."""

    def __call__(self, run: Run, step: int) -> None:
        """Does it, with the state of the run after `step` steps."""


HookFactory = Callable[[Run], Hook]
Evaluate = Callable[[nnx.State], tuple[dict[str, float | str], str]]


def make_hooks(run: Run, extra: Sequence[HookFactory] = ()) -> list[Hook]:
    """Returns the hooks that the run's config asks for, and `extra` ones, in the order in which they are called.

    Raises:
      ConfigError: a hook cannot be made, or generated answers are asked for and `extra` has no hook for them.
    """
    config, hooks = run.config, []
    if config.validation.every and run.held_out is not None:
        hooks.append(validation_hook(run))
    hooks += [make(run) for make in extra]
    if config.validation.num_generations and all(getattr(hook, "kind", None) != "generation" for hook in hooks):
        raise ConfigError("validation.num_generations needs a hook of the kind `generation`, which `dlm train` adds; "
                          "give one in train(hooks=...), or set validation.num_generations to 0")
    if config.log.sample_every:
        hooks.append(sample_hook(run))
    hooks.append(Checkpoints(run))
    if config.log.profile:
        hooks.append(Profile(run))
    return hooks


@dataclasses.dataclass(frozen=True)
class PeriodicEval:
    """A hook that evaluates the parameters, and records the result.

    Attributes:
      kind: of the records, in metrics.jsonl and in the run's summary.
      category: what its time counts as; see `metrics.CATEGORIES`.
      evaluate: from all parameters to the values of a record, and a line for people.
      every: steps between calls; of several numbers, each.
      at_ends: also before the first step of the run and after the last.
    """

    kind: str
    category: str
    evaluate: Evaluate
    every: tuple[int, ...]
    at_ends: bool = True

    def is_due(self, run: Run, step: int) -> bool:
        if self.at_ends and step in (0, run.config.num_steps):
            return True
        return step > run.first_step and any(step % every == 0 for every in self.every)

    def __call__(self, run: Run, step: int) -> None:
        with run.clock.measure(self.category):
            values, line = self.evaluate(run.state.inference_params)
        run.record(step, self.kind, values, line)


def validation_hook(run: Run) -> PeriodicEval:
    """Returns the hook that scores held-out rows: with every checkpoint too if the best is kept."""
    config = run.config
    validate = Validation(
        nnx.graphdef(run.base.model), run.held_out, run.mesh, num_rows=config.validation.num_rows,
        num_samples=config.validation.num_samples, objective=config.objective, seed=config.seed,
        batch_size=config.data.batch_size // config.optimizer.accumulate_steps,
        mask_token_id=run.base.diffusion.mask_token_id, matmul=run.base.model.compute.matmul)

    def evaluate(params: nnx.State) -> tuple[dict[str, float], str]:
        values = validate(params)
        if config.objective.trains_drafts:
            return values, _drafts_line(values)
        clean = f"  AR {values['clean_nll']:.4f}" if "clean_nll" in values else ""
        return values, f"held-out bound {values['bound']:.4f} nats per token{clean}  accuracy {values['accuracy']:.3f}"

    every = (config.validation.every, *[config.checkpoint.every] * config.checkpoint.keep_best)
    return PeriodicEval("validation", "validation", evaluate, every)


def _drafts_line(values: dict[str, float]) -> str:
    """Returns the record of drafts for people."""
    slots = [values[f"acceptance_{slot}"] for slot in range(1, len(values) + 1) if f"acceptance_{slot}" in values]
    return (f"held-out loss {values['loss']:.4f}  tokens per pass {values['tokens_per_pass']:.3f}, of the likeliest "
            f"{values['top_tokens_per_pass']:.3f}  accepted {' '.join(f'{share:.3f}' for share in slots)}")


class Validation:
    """The bound on held-out rows: the same rows, under the same noise, each time.

    Args:
      num_rows: number of rows, at most.
      num_samples: noise levels per row; the autoregressive loss has no noise and takes one.
      batch_size: rows of one forward pass.
    """

    def __init__(self, graphdef: nnx.GraphDef, rows: RowSource, mesh: Mesh, *, num_rows: int, num_samples: int,
                 batch_size: int, objective: ObjectiveConfig, seed: int, mask_token_id: int | None,
                 matmul: MatmulKind = "default"):
        self._objective = objective.for_validation()
        self.num_rows = min(num_rows, len(rows))
        self.num_samples = 1 if objective.name == "autoregressive" else num_samples
        self._eval_step = make_eval_step(graphdef, mesh, objective=objective, seed=seed, num_rows=self.num_rows,
                                         num_samples=self.num_samples, mask_token_id=mask_token_id, matmul=matmul)
        loader = Loader([rows], batch_size, shuffle=False)
        self._batches = [make_global_batch(functools.partial(self._read, loader, i), batch_size, mesh)
                         for i in range(-(-self.num_rows // batch_size))]

    def _read(self, loader: Loader, index: int, rows: slice) -> Batch:
        """Returns rows of a batch; those past the last validation row are not scored."""
        batch = loader.batch(index, rows)
        is_used = np.asarray(batch.example_index) < self.num_rows
        return dataclasses.replace(batch, noisable_mask=batch.noisable_mask & is_used[:, None])

    def __call__(self, params: nnx.State) -> dict[str, float]:
        """Returns the bound in nats per token, or a drafter's loss, and other metrics."""
        sums = functools.reduce(operator.add, (self._eval_step(params, batch, np.int32(sample))
                                               for batch in self._batches for sample in range(self.num_samples)))
        if isinstance(sums, DraftSums):
            metrics = sums.metrics() | {"loss": sums.loss / sums.normalizer()}
        else:
            metrics = metrics_from_sums(sums, self._objective)
        return {name: float(value) for name, value in jax.device_get(metrics).items()}


def sample_hook(run: Run) -> PeriodicEval:
    """Returns the hook that samples an unconditional text into the log, with the same noise each time.

    Raises:
      DataError: the tokenizer has no token to start from.
    """
    config, base = run.config, run.base
    start = start_token(base.tokenizer, config.data.add_bos, config.data.packing)
    length = min(config.data.length, _SAMPLE_LENGTH)
    spec = SamplingSpec(SamplerConfig(num_steps=config.log.sample_steps, top_p=0.9), base.diffusion)

    def evaluate(params: nnx.State) -> tuple[dict[str, str], str]:
        model = nnx.merge(nnx.graphdef(base.model), params)
        tokens = sample(model, jnp.full((1, length), start, jnp.int32), jnp.arange(length)[None] == 0,
                        jnp.full((1,), length), example_keys(config.seed, jnp.zeros((1,), jnp.uint32)), spec).tokens
        text = base.tokenizer.decode(jax.device_get(tokens)[0], skip_special_tokens=True)
        return {"text": text}, f"sample: {text}"

    return PeriodicEval("sample", "sampling", evaluate, (config.log.sample_every,), at_ends=False)


class Checkpoints:
    """Saves the state: every so many steps, and when the run ends or is stopped."""

    def __init__(self, run: Run):
        config = run.config.checkpoint
        self._writer = CheckpointWriter(run.workdir, keep=config.keep, keep_best=config.keep_best)
        run.exit_stack.callback(self._writer.close)

    def is_due(self, run: Run, step: int) -> bool:
        return step > run.first_step and (step % run.config.checkpoint.every == 0 or self._is_last(run, step))

    def __call__(self, run: Run, step: int) -> None:
        validation = run.latest.get("validation", {})
        bound = validation.get("bound", validation.get("loss")) if validation.get("step") == step else math.inf
        with run.clock.measure("checkpointing"):
            progress = {"metrics": run.accumulator.state(), "data": run.data_fingerprint,
                        "seconds": run.clock.seconds()}
            self._writer.save(step, run.state, progress, bound if math.isfinite(bound) else None)
            if self._is_last(run, step):
                self._writer.wait()

    @staticmethod
    def _is_last(run: Run, step: int) -> bool:
        return step == run.config.num_steps or run.stop_signal is not None


class Profile:
    """Writes a trace of given steps into `workdir/profile`, for TensorBoard or Perfetto."""

    def __init__(self, run: Run):
        self._folder, (self._first, self._last) = run.workdir / "profile", run.config.log.profile
        self._local: pathlib.Path | None = None
        run.exit_stack.callback(self._stop)

    def is_due(self, run: Run, step: int) -> bool:
        return step == self._first - 1 or (step == self._last and self._local is not None)

    def __call__(self, run: Run, step: int) -> None:
        if step == self._first - 1:
            self._local = pathlib.Path(tempfile.mkdtemp() if is_remote(self._folder) else self._folder)
            jax.profiler.start_trace(str(self._local))
            return
        jax.block_until_ready(run.state)
        self._stop()
        run.console.line(f"step {step:>7}  trace written to {self._folder}")

    def _stop(self) -> None:
        if self._local is None:
            return
        jax.profiler.stop_trace()
        if is_remote(self._folder):
            upload(self._local, self._folder)
            shutil.rmtree(self._local)
        self._local = None
