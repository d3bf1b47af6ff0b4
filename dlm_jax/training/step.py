"""The training step: from a state and a batch to the next state and its metrics."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from dlm_jax.diffusion import Batch, DraftSums, LossSums, ObjectiveConfig
from dlm_jax.matmul import MatmulKind, compiler_options
from dlm_jax.parallel import num_batch_shards, param_shardings, state_shardings
from dlm_jax.training.diffusion_loss import DiffusionLoss
from dlm_jax.training.draft_loss import DrafterLoss, SelfDraftLoss
from dlm_jax.training.optimizer import OptimizerConfig, learning_rate
from dlm_jax.training.router import RoutedSums
from dlm_jax.training.state import DEVICE, HOST, Frozen, Metrics, TrainState, in_memory

Sums = LossSums | DraftSums | RoutedSums


class StepLoss(Protocol):
    """What a step minimizes."""

    def zero(self, params: nnx.State, frozen: Frozen) -> Sums:
        """Returns the sums of no batch."""

    def __call__(self, params: nnx.State, frozen: Frozen, batch: Batch, step: jax.Array, batch_size: int) -> Sums:
        """Returns sums over a batch, any slice of a global one of `batch_size` rows; of `loss` there is a gradient."""

    def normalizer(self, sums: Sums) -> jax.Array:
        """Returns what the loss of the global batch is divided by."""

    def metrics(self, sums: Sums, step: jax.Array) -> Metrics:
        """Returns what a record says besides the loss."""


def make_train_step(graphdef: nnx.GraphDef, optimizer: optax.GradientTransformation, mesh: Mesh, *,
                    objective: ObjectiveConfig, config: OptimizerConfig, num_steps: int, seed: int,
                    mask_token_id: int | None,
                    matmul: MatmulKind = "default") -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Returns the jitted step, in two programs if the optimizer state is offloaded; it donates the state.

    Gradients are those of sums over tokens, added in float32 over micro-batches and devices and divided once by the
    count of the global batch, so that the result does not depend on how the batch is split. They are taken by
    `state.params`; none is computed by `state.frozen`.
    """
    rate = learning_rate(config, num_steps)
    num_shards = num_batch_shards(mesh)
    step_loss = make_loss(graphdef, mesh, objective, seed, mask_token_id)

    def loss(params: nnx.State, frozen: Frozen, batch: Batch, step: jax.Array,
             batch_size: int) -> tuple[jax.Array, Sums]:
        sums = step_loss(params, frozen, batch, step, batch_size)
        return sums.loss, sums

    def gradients(params: nnx.State, frozen: Frozen, batch: Batch,
                  step: jax.Array) -> tuple[nnx.State, Sums]:
        """Returns the gradients and the sums of all micro-batches."""
        gradient = jax.grad(functools.partial(loss, batch_size=batch.tokens.shape[0]), has_aux=True)
        if config.accumulate_steps == 1:
            return gradient(params, frozen, batch, step)

        def add(total: tuple[nnx.State, Sums], micro_batch: Batch) -> tuple[tuple[nnx.State, Sums], None]:
            return jax.tree.map(jnp.add, total, gradient(params, frozen, micro_batch, step)), None

        zero = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params), step_loss.zero(params, frozen)
        return jax.lax.scan(add, zero, micro_batches(batch, config.accumulate_steps, num_shards))[0]

    def gradients_and_metrics(params: nnx.State, frozen: Frozen, batch: Batch,
                              step: jax.Array) -> tuple[nnx.State, Metrics]:
        """Returns the gradient for the optimizer, float32, and the metrics."""
        grads, sums = gradients(params, frozen, batch, step)
        count = step_loss.normalizer(sums)
        grads = jax.tree.map(lambda g: g.astype(jnp.float32) / count, grads)
        return grads, step_loss.metrics(sums, step) | {
            "loss": sums.loss / count,
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": rate(step),
        }

    def update(state: TrainState, grads: nnx.State, metrics: Metrics) -> TrainState:
        frozen, state = state.frozen, dataclasses.replace(state, frozen=Frozen())
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema is not None:
            ema = optax.incremental_update(params, ema, 1.0 - config.ema_decay)
        after = TrainState(state.step + 1, params, opt_state, ema)
        if config.on_nonfinite == "skip":
            finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
            before = dataclasses.replace(state, step=after.step)
            after = jax.tree.map(functools.partial(jnp.where, finite), after, before)
        return dataclasses.replace(after, frozen=frozen)

    @functools.partial(jax.jit, donate_argnums=0, compiler_options=compiler_options(matmul))
    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        grads, metrics = gradients_and_metrics(state.params, state.frozen, batch, state.step)
        return update(state, grads, metrics), metrics

    return _offloaded_step(gradients_and_metrics, update, mesh) if config.offload else train_step


def make_loss(graphdef: nnx.GraphDef, mesh: Mesh, objective: ObjectiveConfig, seed: int, mask_token_id: int | None, *,
              evaluates: bool = False) -> StepLoss:
    """Returns the loss of an objective.

    Args:
      evaluates: there is no dropout, and of drafts it is measured what the target accepts, whatever the loss.
    """
    kinds = {"drafter": DrafterLoss, "self_drafting": SelfDraftLoss}
    return kinds.get(objective.name, DiffusionLoss)(graphdef, mesh, objective, seed, mask_token_id, evaluates)


def _offloaded_step(gradients_and_metrics: Callable, update: Callable, mesh: Mesh) -> Callable:
    """Returns a step whose optimizer state is in host memory while the gradient is computed.

    In a single program XLA would choose when to fetch the state: before the activations are freed, or after.
    """
    def move_opt_state(state: TrainState, kind: str) -> TrainState:
        shardings = in_memory(state_shardings(state.opt_state, mesh), kind)
        return dataclasses.replace(state, opt_state=jax.device_put(state.opt_state, shardings))

    @jax.jit
    def compute_gradients(params: nnx.State, frozen: Frozen, batch: Batch,
                          step: jax.Array) -> tuple[nnx.State, Metrics]:
        grads, metrics = gradients_and_metrics(params, frozen, batch, step)
        return jax.lax.with_sharding_constraint(grads, param_shardings(grads, mesh)), metrics

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def apply_gradients(state: TrainState, grads: nnx.State, metrics: Metrics) -> TrainState:
        return move_opt_state(update(move_opt_state(state, DEVICE), grads, metrics), HOST)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        grads, metrics = compute_gradients(state.params, state.frozen, batch, state.step)
        return apply_gradients(state, grads, metrics), metrics

    train_step.programs = compute_gradients, apply_gradients
    return train_step


def make_eval_step(graphdef: nnx.GraphDef, mesh: Mesh, *, objective: ObjectiveConfig, seed: int, num_rows: int,
                   num_samples: int, mask_token_id: int | None,
                   matmul: MatmulKind = "default") -> Callable[[nnx.State, Batch, jax.Array], Sums]:
    """Returns the jitted sums of the bound over held-out rows, for one noise sample: bidirectional, without dropout.

    For a drafter they are those of its losses, and of what the target accepts, for one sample of anchors.

    The noise depends on (seed, row, sample) only, and covers all times whatever training does: the samples of a row are
    neighbors among `num_rows * num_samples` examples, whose times are spread over the range, and so are those of a row.
    """
    loss = make_loss(graphdef, mesh, objective.for_validation(), seed, mask_token_id, evaluates=True)

    @functools.partial(jax.jit, compiler_options=compiler_options(matmul))
    def eval_step(params: nnx.State, batch: Batch, sample: jax.Array) -> Sums:
        batch = dataclasses.replace(batch, example_index=batch.example_index * num_samples + sample.astype(jnp.uint32))
        return loss(params, Frozen(), batch, jnp.int32(0), num_rows * num_samples)

    return eval_step


def micro_batches(batch: Batch, count: int, num_shards: int) -> Batch:
    """Splits [batch, ...], sharded into `num_shards` contiguous runs of rows, into [count, batch / count, ...].

    A micro-batch takes a contiguous run of each shard: no row changes its device, and pairs of rows, whose times
    balance, stay together wherever the run is even.
    """
    def split(x: jax.Array) -> jax.Array:
        runs = x.reshape(num_shards, count, -1, *x.shape[1:])
        return jnp.swapaxes(runs, 0, 1).reshape(count, -1, *x.shape[1:])

    return jax.tree.map(split, batch)
