"""From hidden states to the bound: cross-entropy where a token was masked, never a [batch, length, vocab] array.

Sums are unnormalized and additive: micro-batches and devices add them, and the step ends with one division.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Self

import jax
import jax.numpy as jnp

from dlm_jax.diffusion.corruption import NoisyBatch
from dlm_jax.diffusion.fused_loss import HeadPlan, head_loss

Unembed = Callable[[jax.Array], jax.Array]  # hidden states [..., embed] -> float32 logits [..., vocab]
Measure = Callable[[jax.Array, jax.Array], jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossSums:
    """Float32 scalars summed over positions; adds up over micro-batches. Only `loss` has a gradient.

    Attributes:
      loss: what is minimized: the objective's weights x cross-entropy over the scored positions, nats.
      weighted_nll: the bound's weights x cross-entropy over the scored positions, nats.
      nll: cross-entropy over the scored positions, nats.
      correct: number of scored positions whose target is the most likely token.
      num_scored: number of scored positions.
      num_noisable: number of positions that could have been noised.
      num_examples: number of rows with such a position.
    """

    loss: jax.Array
    weighted_nll: jax.Array
    nll: jax.Array
    correct: jax.Array
    num_scored: jax.Array
    num_noisable: jax.Array
    num_examples: jax.Array

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


def loss_sums(hidden: jax.Array, kernel: jax.Array, plan: HeadPlan, batch: NoisyBatch, *,
              weights: jax.Array | None = None, shift: bool = True) -> LossSums:
    """Scores `hidden` [batch, length, embed] against the batch's targets, where its loss mask is set.

    Args:
      kernel: of the head, [vocab, embed] or [embed, vocab], see `plan`.
      weights: float32 [batch, length], of each position's cross-entropy in what is minimized; None: the bound's.
      shift: logits at n - 1 predict token n, the AR alignment; position 0 is then never scored.
    """
    targets, loss_mask, bound_weights = batch.targets, batch.loss_mask, batch.weights
    weights = bound_weights if weights is None else weights
    if shift:
        loss_mask, targets, bound_weights, weights = _shift(loss_mask, targets, bound_weights, weights)
    bound_weights, weights = (jnp.where(loss_mask, x, 0.0) for x in (bound_weights, weights))
    loss, nll, correct = head_loss(hidden, kernel, targets, loss_mask, weights, plan)
    total = functools.partial(jnp.sum, dtype=jnp.float32)
    return LossSums(loss=loss, weighted_nll=total(bound_weights * nll), nll=total(nll), correct=total(correct),
                    num_scored=total(loss_mask), num_noisable=total(batch.noisable_mask),
                    num_examples=total(batch.noisable_mask.any(axis=1)))


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Returns -log p of each target in nats: [..., vocab] and int [...] to float32 [...]."""
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def top1_correct(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Returns 1 where the target is the most likely token, else 0: [..., vocab] and int [...] to float32 [...]."""
    return (jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32)


def token_nll(hidden: jax.Array, unembed: Unembed, targets: jax.Array, mask: jax.Array | None = None, *,
              shift: bool = True, chunk_size: int = 128, measure: Measure = cross_entropy) -> jax.Array:
    """Returns the cross-entropy of int `targets`, float32 [batch, length] in nats each; not differentiable.

    Args:
      mask: bool [batch, length], where it is computed; elsewhere, and at position 0 under `shift`, the result is 0.
        Each row's masked positions are sorted to the front, and a loop visits as many chunks of columns as the fullest
        row needs: rows stay on their devices, however they are spread.
      chunk_size: positions of each row whose logits exist at one time.
      measure: computes what is returned from logits and targets.
    """
    mask = jnp.ones(targets.shape, bool) if mask is None else mask
    if shift:
        mask, targets = _shift(mask, targets)
    size = min(chunk_size, targets.shape[1])
    order = jnp.argsort(~mask, axis=1, stable=True)

    def visit(index: jax.Array, nll: jax.Array) -> jax.Array:
        chunk = jax.lax.dynamic_slice_in_dim(order, index * size, size, axis=1)  # the last may overlap the one before
        logits = unembed(jnp.take_along_axis(hidden, chunk[..., None], axis=1))  # [batch, size, vocab]
        values = measure(logits, jnp.take_along_axis(targets, chunk, axis=1))
        return jax.lax.dynamic_update_slice_in_dim(nll, values, index * size, axis=1)

    num_chunks = -(-jnp.max(jnp.sum(mask, axis=1)) // size)
    nll = jax.lax.fori_loop(0, num_chunks, visit, jnp.zeros(targets.shape, jnp.float32))
    nll = jnp.where(mask, jnp.take_along_axis(nll, jnp.argsort(order, axis=1), axis=1), 0.0)
    return jnp.roll(nll, 1, axis=1) if shift else nll


def _shift(mask: jax.Array, *others: jax.Array) -> list[jax.Array]:
    """Moves arrays [batch, length] to the positions whose states predict them; nothing predicts position 0.

    This is the one place of the loss where the AR alignment is undone, on small arrays; the states stay where they are.
    """
    mask = mask & (jnp.arange(mask.shape[1]) > 0)
    return [jnp.roll(x, -1, axis=1) for x in (mask, *others)]
