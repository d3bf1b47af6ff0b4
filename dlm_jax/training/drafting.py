"""Training a drafter: the frozen target makes features and distributions in the step that the drafter learns from."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from dlm_jax.attention import AttentionMask, soft_cap
from dlm_jax.checkpoints import Pretrained, load_pretrained
from dlm_jax.checkpoints.drafter import resolve_drafter
from dlm_jax.checkpoints.pretrained import Shardings
from dlm_jax.checkpoints.source import absolute_source, find_base
from dlm_jax.checkpoints.workdir import DrafterRecord
from dlm_jax.diffusion import Batch, DraftObjective, DraftSums, Guesses, draft_blocks, draft_losses, sum_chunks
from dlm_jax.diffusion.config import ObjectiveConfig
from dlm_jax.diffusion.corruption import clean_batch, concat_noisy_and_clean
from dlm_jax.diffusion.objective import attention_mask
from dlm_jax.errors import ConfigError
from dlm_jax.matmul import MatmulKind, matmul
from dlm_jax.models import (
    Compute,
    DraftedModel,
    Drafter,
    DrafterConfig,
    ModelConfig,
    Transformer,
    abstract_drafter,
    fingerprint,
)
from dlm_jax.models.drafter_heads import score_candidates
from dlm_jax.parallel import all_gather_embeddings, array_sharding, param_shardings
from dlm_jax.random import dropout_seeds
from dlm_jax.training.config import TrainConfig
from dlm_jax.training.state import Frozen


@dataclasses.dataclass(frozen=True)
class DraftLoss:
    """What a step of the objective `drafter` minimizes; see `step.StepLoss`.

    Attributes:
      graphdef: of a `DraftedModel`.
      measure: also compute what the target accepts where no loss needs the target's distribution.
    """

    graphdef: nnx.GraphDef
    mesh: Mesh
    objective: DraftObjective
    seed: int
    measure: bool = False

    @property
    def _needs_target(self) -> bool:
        return self.measure or self.objective.l1 > 0 or self.objective.confidence > 0

    def zero(self, params: nnx.State, frozen: Frozen) -> DraftSums:
        model = nnx.merge(self.graphdef, params, frozen.base)
        return DraftSums.zero(model.drafter.config.num_drafts, target=self._needs_target)

    def __call__(self, params: nnx.State, frozen: Frozen, batch: Batch, step: jax.Array,
                 batch_size: int) -> DraftSums:
        gathered = (all_gather_embeddings(part, self.mesh) for part in (params, jax.lax.stop_gradient(frozen.base)))
        model: DraftedModel = nnx.merge(self.graphdef, *gathered)
        target, drafter, config = model.target, model.drafter, model.drafter.config
        blocks = draft_blocks(self.objective, batch, config.num_drafts, seed=self.seed)
        mask = AttentionMask.causal()
        mask = mask if batch.segment_ids is None else mask.with_segments(batch.segment_ids)
        states, features = target.hidden_and_features(batch.tokens, mask, config.target_layer_ids,
                                                      positions=batch.positions)

        def by_rows(x: jax.Array) -> jax.Array:  # blocks begin anywhere in a text: it is not split among devices
            return jax.lax.with_sharding_constraint(x, array_sharding(self.mesh, "batch", *[None] * (x.ndim - 1)))

        embeddings = by_rows(model.block_embeddings(blocks.previous[..., 0]))
        # Where no loss needs the states, XLA would drop them, and with them what tells it how to split the target.
        states, features = jax.lax.optimization_barrier((by_rows(states), by_rows(features)))
        blocks = jax.tree.map(by_rows, blocks)
        hidden = by_rows(drafter.hidden(by_rows(drafter.fuse(features)), embeddings, blocks.anchors,
                                        positions=batch.positions, segment_ids=batch.segment_ids))
        hidden = hidden.reshape(*blocks.anchors.shape, -1, hidden.shape[-1])[:, :, config.first_slot :]

        # What all blocks share, and what each has, for a function that sees a few blocks at a time.
        tables, moving = {}, {"hidden": hidden}
        fixed = {"labels": blocks.labels, "counted": blocks.counted}
        if drafter.markov is not None:
            tables["markov"] = drafter.markov.next[...]
            moving["markov"] = drafter.markov.steps(blocks.previous, hidden)
        if self.objective.confidence:
            moving["confidence"] = drafter.confidence(blocks.previous, hidden)
        if drafter.selector is not None:
            tables["selector"] = drafter.selector.successors[...]
            moving["selector"] = drafter.selector.query(blocks.previous, hidden)
        if self._needs_target:
            places = blocks.states.reshape(len(states), -1, 1)
            fixed["target"] = jnp.take_along_axis(states, places, axis=1).reshape(hidden.shape)
        head = target.head_kernel[...].astype(hidden.dtype)
        plan = _ChunkPlan(self.objective, target.head is None, target.compute.matmul, config.selector_top_k,
                          target.config.logit_softcap)
        zero = functools.partial(DraftSums.zero, config.num_drafts, target=self._needs_target)
        return sum_chunks(functools.partial(_chunk_sums, plan), zero, tables, moving, head, fixed)

    def normalizer(self, sums: DraftSums) -> jax.Array:
        return sums.normalizer()

    def metrics(self, sums: DraftSums, step: jax.Array) -> dict[str, jax.Array]:
        return sums.metrics()


@dataclasses.dataclass(frozen=True)
class SelfDraftLoss:
    """What a step of the objective `self_drafting` minimizes; see `step.StepLoss`.

    A row is read twice in one pass: as it is, which the base computes with all its knowledge, and as masks alone, where
    LoRA acts. Each block of masks sees the text before it and drafts all its tokens but the first, which the base's
    own state of the token before predicts.

    Attributes:
      graphdef: of a `Transformer` with LoRA at noised positions.
      seed: of dropout; None: there is none.
      measure: also compute what the base accepts where no loss needs the base's distribution.
    """

    graphdef: nnx.GraphDef
    mesh: Mesh
    objective: ObjectiveConfig
    seed: int | None
    mask_token_id: int
    measure: bool = False

    @property
    def _needs_target(self) -> bool:
        return self.measure or self.objective.drafts.l1 > 0

    @property
    def _num_drafts(self) -> int:
        return self.objective.block_size - 1

    def zero(self, params: nnx.State, frozen: Frozen) -> DraftSums:
        return DraftSums.zero(self._num_drafts, target=self._needs_target)

    def __call__(self, params: nnx.State, frozen: Frozen, batch: Batch, step: jax.Array,
                 batch_size: int) -> DraftSums:
        gathered = (all_gather_embeddings(part, self.mesh) for part in (params, jax.lax.stop_gradient(frozen.base)))
        model: Transformer = nnx.merge(self.graphdef, *gathered)
        (rows, length), size = batch.tokens.shape, self.objective.block_size
        clean = clean_batch(batch.tokens, batch.noisable_mask)
        masked = dataclasses.replace(clean, tokens=jnp.full_like(batch.tokens, self.mask_token_id),
                                     positions=batch.positions)
        both = concat_noisy_and_clean([masked], size)
        seeds = None if self.seed is None else dropout_seeds(self.seed, batch.example_index)
        hidden = model.hidden(both.tokens, attention_mask(self.objective, batch, step, 0), positions=both.positions,
                              noised=both.noised, dropout_seeds=seeds)

        def blocks(x: jax.Array, first: int, last: int) -> jax.Array:
            """Returns slots of all full blocks: [batch, length, ...] to [batch, blocks, last - first, ...]."""
            full = x[:, : length // size * size]
            return full.reshape(rows, -1, size, *x.shape[2:])[:, :, first:last]

        counted, segments = blocks(batch.noisable_mask, 1, size), batch.segment_ids
        if segments is not None:
            counted &= blocks(segments, 1, size) == blocks(segments, 0, 1)
        drafting = model.correct_drafts(hidden[:, :length], batch.tokens)
        fixed = {"labels": blocks(batch.tokens, 1, size), "counted": jnp.cumprod(counted, axis=-1).astype(bool)}
        if self._needs_target:
            fixed["target"] = jax.lax.stop_gradient(blocks(hidden[:, length:], 0, size - 1))
        head = model.head_kernel[...].astype(hidden.dtype)
        plan = _ChunkPlan(self.objective.drafts, model.head is None, model.compute.matmul, 0,
                          model.config.logit_softcap)
        zero = functools.partial(DraftSums.zero, self._num_drafts, target=self._needs_target)
        return sum_chunks(functools.partial(_chunk_sums, plan), zero, {}, {"hidden": blocks(drafting, 0, size - 1)},
                          head, fixed)

    def normalizer(self, sums: DraftSums) -> jax.Array:
        return sums.normalizer()

    def metrics(self, sums: DraftSums, step: jax.Array) -> dict[str, jax.Array]:
        return sums.metrics()


class _ChunkPlan(NamedTuple):
    """How a few blocks are scored; `tied`: the head is the embedding, [vocab, embed]."""

    objective: DraftObjective
    tied: bool
    matmul: MatmulKind
    top_k: int
    softcap: float | None


def _chunk_sums(plan: _ChunkPlan, tables: dict[str, jax.Array], moving: dict[str, jax.Array], head: jax.Array,
                fixed: dict[str, jax.Array]) -> DraftSums:
    """Returns the losses of a few blocks of each row; the only place where there are logits."""
    def logits_of(states: jax.Array, kernel: jax.Array, transposed: bool) -> jax.Array:
        rows = states.reshape(-1, states.shape[-1])
        logits = matmul(rows, kernel.astype(rows.dtype), plan.matmul, transpose_b=transposed)
        return logits.reshape(*states.shape[:-1], -1)

    logits = soft_cap(logits_of(moving["hidden"], head, plan.tied), plan.softcap)
    if "markov" in tables:
        logits += logits_of(moving["markov"], tables["markov"], True)
    candidates = scores = None
    if "selector" in tables:
        top, candidates = jax.lax.top_k(logits, plan.top_k)
        scores = score_candidates(moving["selector"], tables["selector"], candidates, top)
    target = soft_cap(logits_of(fixed["target"], head, plan.tied), plan.softcap) if "target" in fixed else None
    guesses = Guesses(logits, moving.get("confidence"), candidates, scores)
    return draft_losses(plan.objective, guesses, target, fixed["labels"], fixed["counted"])


def load_target(record: DrafterRecord, config: TrainConfig, workdir: epath.Path, compute: Compute,
                shardings: Shardings) -> Pretrained:
    """Loads the target of a run that goes on.

    Raises:
      CheckpointError: it is gone, or has changed.
    """
    target = load_pretrained(find_base(record.source, workdir), mask_token=record.mask_token, compute=compute,
                             param_dtype=config.drafter.target_dtype, shardings=shardings)
    record.check(fingerprint(nnx.state(target.model)), workdir)
    return target


def add_drafter(base: Pretrained, config: TrainConfig, mesh: Mesh, record: DrafterRecord | None) -> Pretrained:
    """Returns the base with a drafter beside it: a new one, or as shapes the one that a run records.

    Raises:
      ConfigError: the drafter's architecture does not fit its losses, the target or the mask token.
    """
    target = base.model
    if record is not None:
        drafter = abstract_drafter(record.config, target.compute, config.model.param_dtype)
        return dataclasses.replace(base, model=DraftedModel(target, drafter))
    mask_token_id = base.diffusion.mask_token_id
    if base.new_mask_token:
        raise ConfigError(f"a drafter's blocks consist of the target's own embeddings, and {base.source} has none for "
                          "a new mask token; set model.mask_token to a token of its vocabulary that no text has")
    if mask_token_id == getattr(base.tokenizer, "pad_token_id", None):
        raise ConfigError(f"the mask token {mask_token_id} also pads texts; set model.mask_token to a token of the "
                          "vocabulary that no text has")
    drafter_config = resolve_drafter(config.drafter, target.config, mask_token_id)
    check_losses(config.objective.drafts, drafter_config)
    dtype, copies = jnp.dtype(config.model.param_dtype), config.drafter.init == "target"
    shardings = param_shardings(abstract_drafter(drafter_config, target.compute, config.model.param_dtype), mesh)

    @functools.partial(jax.jit, out_shardings=shardings)
    def initialize(seed: jax.Array, target: nnx.State) -> nnx.State:
        drafter = Drafter(drafter_config, rngs=nnx.Rngs(jax.random.key(seed)), compute=compute, param_dtype=dtype)
        if copies:
            copy_layers(nnx.merge(target_graph, target), drafter)
        return nnx.state(drafter)

    compute, (target_graph, target_state) = target.compute, nnx.split(target)
    params = initialize(config.seed, target_state if copies else nnx.State({}))
    drafter = nnx.merge(nnx.graphdef(abstract_drafter(drafter_config, compute, config.model.param_dtype)), params)
    return dataclasses.replace(base, model=DraftedModel(target, drafter))


def copy_layers(target: Transformer, drafter: Drafter) -> None:
    """Sets a drafter's layers and final norm to the target's last ones.

    They expect the residual stream of those layers, normed: what is fused begins as that of the last tapped layer.
    """
    number, embed = drafter.config.layers.num_layers, target.config.hidden_size
    dtype = drafter.fc.kernel.dtype
    layers = jax.tree.map(lambda x: x[-number:].astype(dtype), nnx.state(target.blocks))
    nnx.update(drafter.blocks, layers)
    nnx.update(drafter.final_norm, jax.tree.map(lambda x: x.astype(dtype), nnx.state(target.final_norm)))
    drafter.hidden_norm.scale.set_value(layers["attention_norm"]["scale"][...][0])
    drafter.fc.kernel.set_value(jnp.zeros(drafter.fc.kernel.shape, dtype).at[-embed:].set(jnp.eye(embed, dtype=dtype)))


def check_losses(objective: DraftObjective, config: DrafterConfig) -> None:
    """Raises ConfigError where a part of the drafter has no loss, or a loss no part."""
    for loss, part, exists in (("confidence", "confidence_head", config.confidence_head),
                               ("selector", "selector_rank", config.selector_rank > 0)):
        if (getattr(objective, loss) > 0) != exists:
            raise ConfigError(f"objective.drafts.{loss} is {getattr(objective, loss)}, and drafter.{part} "
                              f"{getattr(config, part)}; set both or neither")
    if objective.cross_entropy == objective.l1 == 0:
        raise ConfigError("objective.drafts.cross_entropy and objective.drafts.l1 are both 0, so that nothing is "
                          "learned; set one of them")


def drafter_record(config: TrainConfig, base: Pretrained) -> DrafterRecord:
    """Returns what a new run records of its drafter and its target."""
    return DrafterRecord(absolute_source(base.source), config.model.mask_token,
                         fingerprint(nnx.state(base.model.target)), base.model.drafter.config)


def describe_drafter(config: DrafterConfig, num_params: int, target: ModelConfig) -> str:
    """Returns what a drafter is, for people."""
    parts = [f"{config.layers.num_layers} layers, {num_params / 1e6:,.2f}M parameters",
             f"guesses {config.num_drafts} tokens from layers {', '.join(map(str, config.target_layer_ids))} of "
             f"{target.num_layers}"]
    parts += [f"{config.markov_head} Markov head of rank {config.markov_rank}"] * (config.markov_rank > 0)
    parts += ["confidences"] * config.confidence_head
    parts += [f"convolutions over {config.conv_kernel_size} slots"] * (config.conv_kernel_size > 0)
    parts += [f"selector among {config.selector_top_k}"] * (config.selector_rank > 0)
    return ", ".join(parts)


def held_out_line(values: dict[str, Any]) -> str:
    """Returns a validation's record for people."""
    slots = [values[f"acceptance_{slot}"] for slot in range(1, len(values) + 1) if f"acceptance_{slot}" in values]
    return (f"held-out loss {values['loss']:.4f}  tokens per pass {values['tokens_per_pass']:.3f}, of the likeliest "
            f"{values['top_tokens_per_pass']:.3f}  accepted {' '.join(f'{share:.3f}' for share in slots)}")
