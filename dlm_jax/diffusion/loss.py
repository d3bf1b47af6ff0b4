"""From hidden states to the bound: cross-entropy where a token was masked, never a [batch, length, vocab] array.

Sums are unnormalized and additive: micro-batches and devices add them, and the step ends with one division.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp

from dlm_jax.diffusion.corruption import NoisyBatch
from dlm_jax.diffusion.fused_loss import HeadPlan, HeadTargets, head_loss
from dlm_jax.diffusion.teacher import TeacherStates

Unembed = Callable[[jax.Array], jax.Array]  # hidden states [..., embed] -> float32 logits [..., vocab]
Measure = Callable[[jax.Array, jax.Array], Any]  # logits and int targets [...] -> a tree of float32 [...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossSums:
    """Float32 scalars summed over positions; adds up over micro-batches. Only `loss` has a gradient.

    Attributes:
      loss: what is minimized, all terms with their weights, nats.
      weighted_nll: the bound's weights x cross-entropy over the scored positions, nats.
      nll: cross-entropy over the scored positions, nats.
      correct: number of scored positions whose target is the most likely token.
      divergence: from the parent's distribution, over the positions where it has a weight.
      distance: of hidden states from the parent's, the same.
      num_taught: number of these positions.
      num_scored: number of scored positions.
      num_noisable: number of positions that could have been noised.
      num_examples: number of rows with such a position.
      clean_nll: AR cross-entropy over the clean copy, nats; 0 where it is not computed.
      num_clean: number of positions of the clean copy that `clean_nll` has.
    """

    loss: jax.Array
    weighted_nll: jax.Array
    nll: jax.Array
    correct: jax.Array
    divergence: jax.Array
    distance: jax.Array
    num_taught: jax.Array
    num_scored: jax.Array
    num_noisable: jax.Array
    num_examples: jax.Array
    clean_nll: jax.Array
    num_clean: jax.Array

    @classmethod
    def zero(cls) -> Self:
        return cls(*(jnp.float32(0) for _ in dataclasses.fields(cls)))

    def __add__(self, other: Self) -> Self:
        return jax.tree.map(jnp.add, self, other)

    def normalizer(self, name: str) -> jax.Array:
        """Returns what the loss is divided by, at least 1, float32.

        Args:
          name: "all_tokens" makes the loss an unbiased estimate of the bound in nats per token, whatever the batch
            size. "masked_tokens" is what the DiffuLLaMA reference implementation divides by; it is biased.
            "per_example" is for weights that are divided by each row's noisable tokens.
        """
        counts = {"all_tokens": self.num_noisable, "masked_tokens": self.num_scored, "per_example": self.num_examples}
        return jnp.maximum(counts[name], 1.0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossWeights:
    """The weight of each position in the terms of what is minimized, float32 [batch, length]; None leaves a term out.

    Attributes:
      noised: of the cross-entropy where the loss mask is set.
      clean: of the AR cross-entropy where `NoisyBatch.clean_mask` is set.
      confidence: of the entropy where the most likely token is right.
      distribution: of the divergence from the parent's distribution.
      distance: of the distance from the parent's hidden states.
    """

    noised: jax.Array
    clean: jax.Array | None = None
    confidence: jax.Array | None = None
    distribution: jax.Array | None = None
    distance: jax.Array | None = None


def loss_sums(hidden: jax.Array, kernel: jax.Array, plan: HeadPlan, batch: NoisyBatch, *,
              weights: LossWeights | None = None, teacher: TeacherStates | None = None,
              distance: jax.Array | None = None, shift: bool = True) -> LossSums:
    """Scores `hidden` [batch, length, embed] against the batch's targets, where its masks are set.

    Args:
      kernel: of the head, [vocab, embed] or [embed, vocab], see `plan`.
      weights: of the terms that are minimized; None: the bound alone.
      teacher: the parent, whose distribution `weights.distribution` compares with.
      distance: float32 [batch, length], of the model's hidden states from the parent's, for `weights.distance`.
      shift: logits at n - 1 predict token n, the AR alignment; position 0 is then never scored. The clean copy's AR
        loss always has it.
    """
    weights = LossWeights(batch.weights) if weights is None else weights
    masked, clean, targets = batch.loss_mask, None, batch.targets
    bound_weights, of_terms = batch.weights, dataclasses.replace(weights, clean=None)
    if shift:
        masked, targets, bound_weights, of_terms = _shift((masked, targets, bound_weights, of_terms))
    if weights.clean is not None:
        clean, next_tokens, clean_weights = _shift((batch.clean_mask, batch.targets, weights.clean))
        targets = jnp.where(clean, next_tokens, targets)
    bound_weights, of_terms = jax.tree.map(lambda x: jnp.where(masked, x, 0.0), (bound_weights, of_terms))

    nll_weights, scored = of_terms.noised, masked
    if clean is not None:
        nll_weights, scored = nll_weights + jnp.where(clean, clean_weights, 0.0), masked | clean
    loss, scores = head_loss(hidden, kernel, HeadTargets(targets, scored, nll_weights, of_terms.confidence,
                                                         of_terms.distribution, teacher), plan)
    if of_terms.distance is not None:
        loss += jnp.sum(of_terms.distance * distance)

    taught = of_terms.distance if of_terms.distribution is None else of_terms.distribution
    taught = None if taught is None else taught > 0

    def total(x: jax.Array | float, where: jax.Array | None) -> jax.Array:
        return jnp.float32(0) if where is None else jnp.sum(jnp.where(where, x, 0.0), dtype=jnp.float32)

    return LossSums(
        loss=loss, weighted_nll=total(bound_weights * scores.nll, masked), nll=total(scores.nll, masked),
        correct=total(scores.correct, masked),
        divergence=total(0.0 if scores.divergence is None else scores.divergence.value, taught),
        distance=total(0.0 if of_terms.distance is None else jax.lax.stop_gradient(distance), taught),
        num_taught=total(1.0, taught), num_scored=total(1.0, masked), num_noisable=total(1.0, batch.noisable_mask),
        num_examples=total(1.0, batch.noisable_mask.any(axis=1)), clean_nll=total(scores.nll, clean),
        num_clean=total(1.0, clean))


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Returns -log p of each target in nats: [..., vocab] and int [...] to float32 [...]."""
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def top1_correct(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Returns 1 where the target is the most likely token, else 0: [..., vocab] and int [...] to float32 [...]."""
    return (jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32)


def token_nll(hidden: jax.Array, unembed: Unembed, targets: jax.Array, mask: jax.Array | None = None, *,
              shift: bool = True, chunk_size: int = 128, measure: Measure = cross_entropy) -> Any:
    """Returns the cross-entropy of int `targets`, float32 [batch, length] in nats each; not differentiable.

    Args:
      mask: bool [batch, length], where it is computed; elsewhere, and at position 0 under `shift`, the result is 0.
        Each row's masked positions are sorted to the front, and a loop visits as many chunks of columns as the fullest
        row needs: rows stay on their devices, however they are spread.
      chunk_size: positions of each row whose logits exist at one time.
      measure: computes what is returned, a tree of such arrays.
    """
    mask = jnp.ones(targets.shape, bool) if mask is None else mask
    if shift:
        mask, targets = _shift((mask, targets))
    size = min(chunk_size, targets.shape[1])
    order = jnp.argsort(~mask, axis=1, stable=True)

    def visit(index: jax.Array, found: Any) -> Any:
        chunk = jax.lax.dynamic_slice_in_dim(order, index * size, size, axis=1)  # the last may overlap the one before
        logits = unembed(jnp.take_along_axis(hidden, chunk[..., None], axis=1))  # [batch, size, vocab]
        values = measure(logits, jnp.take_along_axis(targets, chunk, axis=1))
        return jax.tree.map(lambda all_values, new: jax.lax.dynamic_update_slice_in_dim(
            all_values, new, index * size, axis=1), found, values)

    def back(found: jax.Array) -> jax.Array:
        """Moves values [batch, length] from the front of their rows to their places."""
        found = jnp.where(mask, jnp.take_along_axis(found, jnp.argsort(order, axis=1), axis=1), 0.0)
        return jnp.roll(found, 1, axis=1) if shift else found

    num_chunks = -(-jnp.max(jnp.sum(mask, axis=1)) // size)
    start = jax.tree.map(lambda x: jnp.zeros(targets.shape, x.dtype),
                         jax.eval_shape(lambda: measure(unembed(hidden[:, :1]), targets[:, :1])))
    return jax.tree.map(back, jax.lax.fori_loop(0, num_chunks, visit, start))


def _shift(arrays: tuple) -> tuple:
    """Moves arrays [batch, length] to the positions whose states predict them; nothing predicts position 0.

    This is the one place of the loss where the AR alignment is undone, on small arrays; the states stay where they are.

    Args:
      arrays: the mask, which becomes False where nothing is predicted, and trees of arrays.
    """
    mask, *others = arrays
    mask = mask & (jnp.arange(mask.shape[1]) > 0)
    return jax.tree.map(lambda x: jnp.roll(x, -1, axis=1), (mask, *others))
