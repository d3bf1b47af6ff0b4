"""What a step of diffusion or autoregression minimizes: noise x AR loss of the clean copy x what the parent teaches.

The parent is the model as it was before training, and reads the clean text causally. With LoRA it is the same model
without LoRA; otherwise the run keeps a copy. Where LoRA acts at noised positions alone, the clean copy of block
diffusion is what the parent computes, and costs no pass of its own.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from dlm_jax.diffusion import (
    Batch,
    HeadPlan,
    LossSums,
    NoisyBatch,
    ObjectiveConfig,
    TeacherStates,
    align_states,
    annealing,
    clean_causal_batch,
    hidden_distance,
    loss_sums,
    loss_weights,
    noise_batch,
)
from dlm_jax.models import LayerVisitor, LoRAParam, Transformer
from dlm_jax.parallel import all_gather_embeddings, array_sharding, partition_spec
from dlm_jax.random import dropout_seeds
from dlm_jax.training.flops import has_parent_pass
from dlm_jax.training.router import RoutedSums
from dlm_jax.training.state import Frozen, Metrics


@dataclasses.dataclass(frozen=True)
class DiffusionLoss:
    """What a step of diffusion or autoregression minimizes; see `step.StepLoss`.

    Attributes:
      evaluates: there is no dropout, and routers are not measured.
    """

    graphdef: nnx.GraphDef
    mesh: Mesh
    objective: ObjectiveConfig
    seed: int
    mask_token_id: int | None
    evaluates: bool = False

    def zero(self, params: nnx.State, frozen: Frozen) -> LossSums | RoutedSums:
        config = self._model(params, frozen).config
        return LossSums.zero() if config.experts is None else RoutedSums.zero(config)

    def __call__(self, params: nnx.State, frozen: Frozen, batch: Batch, step: jax.Array,
                 batch_size: int) -> LossSums | RoutedSums:
        objective = self.objective.canonicalize(batch.tokens.shape[1])
        model = self._model(params, frozen, gathered=True)
        noisy, mask = noise_batch(objective, batch, step, seed=self.seed, batch_size=batch_size,
                                  mask_token_id=self.mask_token_id, vocab_size=model.config.vocab_size)
        parent = self._parent(objective, params, frozen, batch)
        seeds = None if self.evaluates else dropout_seeds(self.seed, batch.example_index)
        hidden, distance, router = model.hidden_and_visited(
            noisy.tokens, mask, _distance_visitor(objective, noisy, batch, parent.features, model.config.num_layers),
            positions=noisy.positions, noised=noisy.noised, dropout_seeds=seeds)
        head, plan = lm_head(self._model(params, frozen), self.mesh)
        teacher = None
        if objective.teacher.distribution_weight:
            length = batch.tokens.shape[1]
            states = hidden[:, -length:] if parent.hidden is None else parent.hidden
            states = align_states(states, hidden.shape[1] // length, shift=objective.shift)
            teacher = TeacherStates(states, parent.kernel, objective.teacher.divergence)
        sums = loss_sums(hidden, head, plan, noisy, weights=loss_weights(objective, noisy), teacher=teacher,
                         distance=distance, shift=objective.shift)
        if objective.clean_weight and noisy.clean_mask is None:
            clean, causal = clean_causal_batch(batch)
            hidden, _, of_clean = model.hidden_and_visited(clean.tokens, causal, None, positions=clean.positions,
                                                           dropout_seeds=seeds)
            router = jax.tree.map(jnp.add, router, of_clean)
            sums += loss_sums(hidden, head, plan, clean, weights=dataclasses.replace(
                loss_weights(objective, clean), confidence=None, distribution=None, distance=None))
        if router is None or self.evaluates:
            return sums
        return RoutedSums.of(sums, router, model.config, self.normalizer(sums), trained=model.lora is None)

    def normalizer(self, sums: LossSums | RoutedSums) -> jax.Array:
        return sums.normalizer(self.objective.loss_normalization)

    def metrics(self, sums: LossSums | RoutedSums, step: jax.Array) -> Metrics:
        routers = {}
        if isinstance(sums, RoutedSums):
            sums, routers = sums.sums, sums.metrics()
        return metrics_from_sums(sums, self.objective) | {"anneal_ratio": annealing(self.objective, step)} | routers

    def _model(self, params: nnx.State, frozen: Frozen, *, gathered: bool = False) -> Transformer:
        """Returns the model; `gathered`: with embedding tables that every device has, to look tokens up."""
        states = (params, frozen.base)
        return nnx.merge(self.graphdef, *(all_gather_embeddings(x, self.mesh) if gathered else x for x in states))

    def _parent(self, objective: ObjectiveConfig, params: nnx.State, frozen: Frozen, batch: Batch) -> "_Parent":
        """Returns the parent of a teacher, and its states of the clean text unless the clean copy has them."""
        if not objective.teacher.is_needed:
            return _Parent(None, None, None)
        trained = jax.lax.stop_gradient(nnx.merge_state(params, frozen.parent))
        parent = self._model(trained, frozen)
        kernel = lm_head(parent, self.mesh)[0]
        if not has_parent_pass(parent.config, objective, batch.tokens.shape[1], parent.lora):
            return _Parent(kernel, None, None)
        clean, causal = clean_causal_batch(batch)
        hidden, features = self._model(trained, frozen, gathered=True).hidden_and_features(
            clean.tokens, causal, compared_layers(objective, parent.config.num_layers), positions=clean.positions,
            lora=False)
        return _Parent(kernel, hidden, features)


class _Parent(NamedTuple):
    """The parent's head, and its states and features of the clean text; without them the clean copy has both."""

    kernel: jax.Array | None
    hidden: jax.Array | None  # [batch, length, embed]
    features: jax.Array | None  # [batch, length, compared layers * embed]


def _distance_visitor(objective: ObjectiveConfig, noisy: NoisyBatch, batch: Batch, features: jax.Array | None,
                      num_layers: int) -> LayerVisitor | None:
    """Returns the visitor of layers that adds up the distance of states from the parent's, [batch, all copies].

    No layer's output is kept for it. None if no term needs the distance.
    """
    layers, length = compared_layers(objective, num_layers), batch.tokens.shape[1]
    if not layers:
        return None
    share, places = np.zeros(num_layers, np.float32), np.zeros(num_layers, np.int32)
    share[list(layers)], places[list(layers)] = 1 / len(layers), np.arange(len(layers))

    def visit(distance: jax.Array, x: jax.Array, layer: jax.Array) -> jax.Array:
        if features is None:
            states = x[:, -length:]
        else:
            by_layer = features.reshape(*features.shape[:2], len(layers), -1)
            states = jax.lax.dynamic_index_in_dim(by_layer, jnp.asarray(places)[layer], axis=2, keepdims=False)
        states = align_states(states, x.shape[1] // length, shift=objective.shift)
        return distance + jnp.asarray(share)[layer] * hidden_distance(x, states)

    return LayerVisitor(jnp.zeros(noisy.tokens.shape, jnp.float32), visit)


def compared_layers(objective: ObjectiveConfig, num_layers: int) -> tuple[int, ...]:
    """Returns the layers whose outputs are compared with the parent's."""
    if not objective.teacher.hidden_weight:
        return ()
    return objective.teacher.hidden_layers or tuple(range(num_layers))


def metrics_from_sums(sums: LossSums, objective: ObjectiveConfig) -> Metrics:
    """Returns nats per token, shares and counts."""
    scored = jnp.maximum(sums.num_scored, 1.0)
    metrics = {
        "bound": sums.weighted_nll / sums.normalizer("all_tokens"),  # nats per token
        "masked_nll": sums.nll / scored,  # unweighted, nats per masked token
        "accuracy": sums.correct / scored,
        "masked_tokens": sums.num_scored,
    }
    if objective.clean_weight:  # AR, nats per token; blocks of one token are autoregression, without another copy
        metrics["clean_nll"] = jnp.where(sums.num_clean > 0, sums.clean_nll / jnp.maximum(sums.num_clean, 1.0),
                                         metrics["masked_nll"])
    taught = jnp.maximum(sums.num_taught, 1.0)
    if objective.teacher.distribution_weight:
        metrics[objective.teacher.divergence] = sums.divergence / taught
    if objective.teacher.hidden_weight:
        metrics["hidden_distance"] = sums.distance / taught
    return metrics


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
