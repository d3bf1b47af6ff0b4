"""What a step minimizes that trains drafts: a drafter's beside its target, or those of LoRA beside its own base.

The model that checks the drafts does not change: its states and its distribution are made in the same step.
"""

import abc
import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from dlm_jax.attention import AttentionMask
from dlm_jax.diffusion import Batch, DraftObjective, DraftSums, Guesses, draft_blocks, draft_losses, sum_chunks
from dlm_jax.diffusion.config import ObjectiveConfig
from dlm_jax.diffusion.corruption import clean_batch, concat_noisy_and_clean
from dlm_jax.diffusion.objective import attention_mask
from dlm_jax.matmul import MatmulKind
from dlm_jax.models import DraftedModel, LMHead, Transformer
from dlm_jax.models.drafter_heads import score_candidates
from dlm_jax.parallel import all_gather_embeddings, array_sharding
from dlm_jax.random import dropout_seeds
from dlm_jax.training.state import Frozen


@dataclasses.dataclass(frozen=True)
class DraftLoss(abc.ABC):
    """What a step minimizes; see `step.StepLoss`.

    Attributes:
      graphdef: of a `DraftedModel`, or of a `Transformer` with LoRA at noised positions.
      evaluates: there is no dropout, and it is measured what the target accepts, whatever the loss.
    """

    graphdef: nnx.GraphDef
    mesh: Mesh
    objective: ObjectiveConfig
    seed: int
    mask_token_id: int | None = None
    evaluates: bool = False

    @abc.abstractmethod
    def __call__(self, params: nnx.State, frozen: Frozen, batch: Batch, step: jax.Array,
                 batch_size: int) -> DraftSums: ...

    @abc.abstractmethod
    def _num_drafts(self, params: nnx.State, frozen: Frozen) -> int: ...

    def zero(self, params: nnx.State, frozen: Frozen) -> DraftSums:
        return DraftSums.zero(self._num_drafts(params, frozen), target=self._needs_target)

    def normalizer(self, sums: DraftSums) -> jax.Array:
        return sums.normalizer()

    def metrics(self, sums: DraftSums, step: jax.Array) -> dict[str, jax.Array]:
        return sums.metrics()

    @property
    def _needs_target(self) -> bool:
        return self.evaluates or self.objective.drafts.reads_target

    def _model(self, params: nnx.State, frozen: Frozen) -> DraftedModel | Transformer:
        """Returns the model, with embedding tables that every device has, to look tokens up."""
        return nnx.merge(self.graphdef, *(all_gather_embeddings(part, self.mesh) for part in (params, frozen.base)))

    def _sums(self, target: Transformer, moving: dict[str, jax.Array], fixed: dict[str, jax.Array],
              tables: dict[str, jax.Array], top_k: int = 0) -> DraftSums:
        """Returns the losses of blocks of guesses, computed a few blocks at a time; see `_chunk_sums`."""
        head = target.head_kernel[...].astype(moving["hidden"].dtype)
        plan = _ChunkPlan(self.objective.drafts, target.head is None, target.compute.matmul, top_k,
                          target.config.logit_softcap)
        zero = functools.partial(DraftSums.zero, fixed["labels"].shape[-1], target=self._needs_target)
        return sum_chunks(functools.partial(_chunk_sums, plan), zero, tables, moving, head, fixed)


class DrafterLoss(DraftLoss):
    """The loss of the objective `drafter`."""

    def _num_drafts(self, params: nnx.State, frozen: Frozen) -> int:
        return nnx.merge(self.graphdef, params, frozen.base).drafter.config.num_drafts

    def __call__(self, params: nnx.State, frozen: Frozen, batch: Batch, step: jax.Array,
                 batch_size: int) -> DraftSums:
        model = self._model(params, frozen)
        target, drafter, config = model.target, model.drafter, model.drafter.config
        blocks = draft_blocks(self.objective.drafts, batch, config.num_drafts, seed=self.seed)
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

        tables, moving = {}, {"hidden": hidden}
        fixed = {"labels": blocks.labels, "counted": blocks.counted}
        if drafter.markov is not None:
            tables["markov"] = drafter.markov.next[...]
            moving["markov"] = drafter.markov.steps(blocks.previous, hidden)
        if self.objective.drafts.confidence:
            moving["confidence"] = drafter.confidence(blocks.previous, hidden)
        if drafter.selector is not None:
            tables["selector"] = drafter.selector.successors[...]
            moving["selector"] = drafter.selector.query(blocks.previous, hidden)
        if self._needs_target:
            places = blocks.states.reshape(len(states), -1, 1)
            fixed["target"] = jnp.take_along_axis(states, places, axis=1).reshape(hidden.shape)
        return self._sums(target, moving, fixed, tables, config.selector_top_k)


class SelfDraftLoss(DraftLoss):
    """The loss of the objective `self_drafting`.

    A row is read twice in one pass: as it is, which the base computes with all its knowledge, and as masks alone, where
    LoRA acts. Each block of masks sees the text before it and drafts all its tokens but the first, which the base's
    own state of the token before predicts.
    """

    def _num_drafts(self, params: nnx.State, frozen: Frozen) -> int:
        return self.objective.block_size - 1

    def __call__(self, params: nnx.State, frozen: Frozen, batch: Batch, step: jax.Array,
                 batch_size: int) -> DraftSums:
        model = self._model(params, frozen)
        (rows, length), size = batch.tokens.shape, self.objective.block_size
        clean = clean_batch(batch.tokens, batch.noisable_mask)
        masked = dataclasses.replace(clean, tokens=jnp.full_like(batch.tokens, self.mask_token_id),
                                     positions=batch.positions)
        both = concat_noisy_and_clean([masked], size)
        seeds = None if self.evaluates else dropout_seeds(self.seed, batch.example_index)
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
        return self._sums(model, {"hidden": blocks(drafting, 0, size - 1)}, fixed, {})


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
    lm_head = LMHead(head, plan.tied, plan.matmul, plan.softcap)
    logits = lm_head(moving["hidden"])
    if "markov" in tables:
        logits += LMHead(tables["markov"], True, plan.matmul)(moving["markov"])
    candidates = scores = None
    if "selector" in tables:
        top, candidates = jax.lax.top_k(logits, plan.top_k)
        scores = score_candidates(moving["selector"], tables["selector"], candidates, top)
    target = lm_head(fixed["target"]) if "target" in fixed else None
    guesses = Guesses(logits, moving.get("confidence"), candidates, scores)
    return draft_losses(plan.objective, guesses, target, fixed["labels"], fixed["counted"])
