"""The training step with its state: from a state and a batch to the next state and its metrics."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Protocol, Self

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from dlm_jax.diffusion import (
    Batch,
    DraftSums,
    HeadPlan,
    LossSums,
    ObjectiveConfig,
    annealing,
    loss_sums,
    noise_batch,
)
from dlm_jax.diffusion.objective import loss_weights
from dlm_jax.matmul import MatmulKind, compiler_options
from dlm_jax.models import LoRAParam, Transformer
from dlm_jax.parallel import (
    all_gather_embeddings,
    array_sharding,
    num_batch_shards,
    param_shardings,
    partition_spec,
    state_shardings,
)
from dlm_jax.random import dropout_seeds
from dlm_jax.training.drafting import DraftLoss, SelfDraftLoss
from dlm_jax.training.optimizer import OptimizerConfig, learning_rate
from dlm_jax.training.router import RoutedSums

Sums = LossSums | DraftSums | RoutedSums
DEVICE, HOST = "device", "pinned_host"  # JAX's names for kinds of memory
Metrics = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that changes from step to step.

    Attributes:
      step: int32 scalar, steps taken.
      params: the trained parameters, as `split_trainable` returns them.
      opt_state: optax's state; its moments carry the logical axes of their parameters.
      ema: moving average of `params` in float32, or None.
      frozen: parameters that no step changes and no checkpoint holds: with LoRA those of the base, else none.
    """

    step: jax.Array
    params: nnx.State
    opt_state: optax.OptState
    ema: nnx.State | None
    frozen: nnx.State = dataclasses.field(default_factory=lambda: nnx.State({}))

    @classmethod
    def create(cls, params: nnx.State, optimizer: optax.GradientTransformation, ema: bool,
               frozen: nnx.State) -> Self:
        """Returns the state before the first step."""
        average = jax.tree.map(lambda p: p.astype(jnp.float32), params) if ema else None
        return cls(step=jnp.int32(0), params=params, opt_state=optimizer.init(params), ema=average, frozen=frozen)

    @property
    def inference_params(self) -> nnx.State:
        """All parameters, as they are validated and exported: of the trained ones the average, if there is one."""
        return nnx.merge_state(self.params if self.ema is None else self.ema, self.frozen)


def state_layout(params: nnx.State, optimizer: optax.GradientTransformation, ema: bool, mesh: Mesh,
                 offload: bool = False, frozen: nnx.State | None = None) -> TrainState:
    """Returns the state as shapes with shardings, for compiling, creating and restoring it.

    Args:
      offload: the optimizer state is in host memory.
      frozen: parameters that are not trained; None: there are none.
    """
    frozen = nnx.State({}) if frozen is None else frozen
    shapes = jax.eval_shape(lambda p, f: TrainState.create(p, optimizer, ema, f), params, frozen)
    trained = param_shardings(params, mesh)
    shardings = dataclasses.replace(state_shardings(shapes, mesh), params=trained, ema=trained if ema else None,
                                    frozen=param_shardings(frozen, mesh))
    if offload:
        shardings = dataclasses.replace(shardings, opt_state=in_memory(shardings.opt_state, HOST))
    return jax.tree.map(lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
                        shapes, shardings)


def create_state(params: nnx.State, optimizer: optax.GradientTransformation, ema: bool, mesh: Mesh,
                 offload: bool = False, frozen: nnx.State | None = None) -> TrainState:
    """Creates the first state in its shardings. Donates `params` and `frozen`: do not use them afterwards."""
    shardings = shardings_of(state_layout(params, optimizer, ema, mesh, offload, frozen))
    frozen = jax.device_put(nnx.State({}) if frozen is None else frozen, shardings.frozen)
    params = jax.device_put(params, shardings.params)
    create = jax.jit(lambda p, f: TrainState.create(p, optimizer, ema, f), out_shardings=shardings,
                     donate_argnums=(0, 1))
    return create(params, frozen)


def in_memory(shardings: object, kind: str) -> object:
    """Returns the same shardings in another kind of memory."""
    return jax.tree.map(lambda sharding: sharding.with_memory_kind(kind), shardings)


def shardings_of(layout: object) -> object:
    """Returns the shardings of a tree of shapes."""
    return jax.tree.map(lambda leaf: leaf.sharding, layout)


class StepLoss(Protocol):
    """What a step minimizes."""

    def zero(self, params: nnx.State, frozen: nnx.State) -> Sums:
        """Returns the sums of no batch."""

    def __call__(self, params: nnx.State, frozen: nnx.State, batch: Batch, step: jax.Array, batch_size: int) -> Sums:
        """Returns sums over a batch, any slice of a global one of `batch_size` rows; of `loss` there is a gradient."""

    def normalizer(self, sums: Sums) -> jax.Array:
        """Returns what the loss of the global batch is divided by."""

    def metrics(self, sums: Sums, step: jax.Array) -> Metrics:
        """Returns what a record says besides the loss."""


@dataclasses.dataclass(frozen=True)
class DiffusionLoss:
    """What a step of diffusion or autoregression minimizes; see `StepLoss`."""

    graphdef: nnx.GraphDef
    mesh: Mesh
    objective: ObjectiveConfig
    seed: int
    mask_token_id: int | None

    def zero(self, params: nnx.State, frozen: nnx.State) -> LossSums | RoutedSums:
        config = nnx.merge(self.graphdef, params, frozen).config
        return LossSums.zero() if config.experts is None else RoutedSums.zero(config)

    def __call__(self, params: nnx.State, frozen: nnx.State, batch: Batch, step: jax.Array,
                 batch_size: int) -> LossSums | RoutedSums:
        objective, mesh = self.objective, self.mesh
        model = nnx.merge(self.graphdef, all_gather_embeddings(params, mesh), all_gather_embeddings(frozen, mesh))
        noisy, mask = noise_batch(objective, batch, step, seed=self.seed, batch_size=batch_size,
                                  mask_token_id=self.mask_token_id)
        hidden, router = model.hidden_and_router(noisy.tokens, mask, positions=noisy.positions, noised=noisy.noised,
                                                 dropout_seeds=dropout_seeds(self.seed, batch.example_index))
        sums = loss_sums(hidden, *lm_head(nnx.merge(self.graphdef, params, frozen), mesh), noisy,
                         weights=loss_weights(objective, noisy), shift=objective.shift)
        if router is None:
            return sums
        return RoutedSums.of(sums, router, model.config, self.normalizer(sums), trained=model.lora is None)

    def normalizer(self, sums: LossSums | RoutedSums) -> jax.Array:
        return sums.normalizer(self.objective.loss_normalization)

    def metrics(self, sums: LossSums | RoutedSums, step: jax.Array) -> Metrics:
        routers = {}
        if isinstance(sums, RoutedSums):
            sums, routers = sums.sums, sums.metrics()
        return metrics_from_sums(sums) | {"anneal_ratio": annealing(self.objective, step)} | routers


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
    step_loss = (_draft_loss(graphdef, mesh, objective, seed, mask_token_id)
                 or DiffusionLoss(graphdef, mesh, objective, seed, mask_token_id))

    def loss(params: nnx.State, frozen: nnx.State, batch: Batch, step: jax.Array,
             batch_size: int) -> tuple[jax.Array, Sums]:
        sums = step_loss(params, frozen, batch, step, batch_size)
        return sums.loss, sums

    def gradients(params: nnx.State, frozen: nnx.State, batch: Batch,
                  step: jax.Array) -> tuple[nnx.State, Sums]:
        """Returns the gradients and the sums of all micro-batches."""
        gradient = jax.grad(functools.partial(loss, batch_size=batch.tokens.shape[0]), has_aux=True)
        if config.accumulate_steps == 1:
            return gradient(params, frozen, batch, step)

        def add(total: tuple[nnx.State, Sums], micro_batch: Batch) -> tuple[tuple[nnx.State, Sums], None]:
            return jax.tree.map(jnp.add, total, gradient(params, frozen, micro_batch, step)), None

        zero = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params), step_loss.zero(params, frozen)
        return jax.lax.scan(add, zero, micro_batches(batch, config.accumulate_steps, num_shards))[0]

    def gradients_and_metrics(params: nnx.State, frozen: nnx.State, batch: Batch,
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
        frozen, state = state.frozen, dataclasses.replace(state, frozen=nnx.State({}))
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


def _draft_loss(graphdef: nnx.GraphDef, mesh: Mesh, objective: ObjectiveConfig, seed: int, mask_token_id: int | None, *,
                evaluates: bool = False) -> StepLoss | None:
    """Returns the loss of an objective that trains drafts; None for any other.

    Args:
      evaluates: there is no dropout, and what the target accepts is measured whatever the loss.
    """
    if objective.name == "drafter":
        return DraftLoss(graphdef, mesh, objective.drafts, seed, measure=evaluates)
    if objective.name == "self_drafting":
        return SelfDraftLoss(graphdef, mesh, objective, None if evaluates else seed, mask_token_id, measure=evaluates)
    return None


def _offloaded_step(gradients_and_metrics: Callable, update: Callable, mesh: Mesh) -> Callable:
    """Returns a step whose optimizer state is in host memory while the gradient is computed.

    In a single program XLA would choose when to fetch the state: before the activations are freed, or after.
    """
    def move_opt_state(state: TrainState, kind: str) -> TrainState:
        shardings = in_memory(state_shardings(state.opt_state, mesh), kind)
        return dataclasses.replace(state, opt_state=jax.device_put(state.opt_state, shardings))

    @jax.jit
    def compute_gradients(params: nnx.State, frozen: nnx.State, batch: Batch,
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
    objective = objective.for_validation()
    draft_loss = _draft_loss(graphdef, mesh, objective, seed, mask_token_id, evaluates=True)

    @functools.partial(jax.jit, compiler_options=compiler_options(matmul))
    def eval_step(params: nnx.State, batch: Batch, sample: jax.Array) -> Sums:
        batch = dataclasses.replace(batch, example_index=batch.example_index * num_samples + sample.astype(jnp.uint32))
        if draft_loss is not None:
            return draft_loss(params, nnx.State({}), batch, jnp.int32(0), num_rows * num_samples)
        model = nnx.merge(graphdef, all_gather_embeddings(params, mesh))
        noisy, mask = noise_batch(objective, batch, jnp.int32(0), seed=seed, batch_size=num_rows * num_samples,
                                  mask_token_id=mask_token_id)
        hidden = model.hidden(noisy.tokens, mask, positions=noisy.positions, noised=noisy.noised)
        return loss_sums(hidden, *lm_head(nnx.merge(graphdef, params), mesh), noisy, shift=objective.shift)

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


def metrics_from_sums(sums: LossSums) -> Metrics:
    """Returns nats per token, shares and counts."""
    scored = jnp.maximum(sums.num_scored, 1.0)
    return {
        "bound": sums.weighted_nll / sums.normalizer("all_tokens"),  # nats per token
        "masked_nll": sums.nll / scored,  # unweighted, nats per masked token
        "accuracy": sums.correct / scored,
        "masked_tokens": sums.num_scored,
    }


def lm_head(model: Transformer, mesh: Mesh) -> tuple[jax.Array, HeadPlan]:
    """Returns the head's kernel and how it is sharded.

    Args:
      model: with tables that are not gathered: the loss gathers the head in its own type, and scatters its gradient.
    """
    param = model.head_kernel
    kernel, trained = param.get_value(), model.lora is None or isinstance(param, LoRAParam)
    return kernel, HeadPlan(param.axes.index("vocab"), mesh, array_sharding(mesh, "batch", "length").spec,
                            partition_spec(param.axes, kernel.shape, mesh), kernel_gradient=trained,
                            matmul=model.compute.matmul, softcap=model.config.logit_softcap)
