"""From hidden states to the bound: cross-entropy where a token was masked, never a [batch, length, vocab] array.

Sums come out unnormalised and additive, so that micro-batches and devices add them and one division ends the step.
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
      loss: what is minimised: the objective's weights x cross-entropy over the scored positions, nats.
      weighted_nll: the bound's weights x cross-entropy over the scored positions, nats.
      nll: cross-entropy over the scored positions, nats.
      correct: how many scored positions have the target as their likeliest token.
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
        """What the loss is divided by, at least 1.

        "maskable" makes the loss an unbiased estimate of the bound in nats per token, whatever the batch size.
        "masked" is the release's form, for comparison; its value depends on how a batch is cut up. "examples" goes
        with weights that are divided by each row's maskable tokens.
        """
        count = {"all_tokens": self.num_noisable, "masked_tokens": self.num_scored, "per_example": self.num_examples}[name]
        return jnp.maximum(count, 1.0)


def loss_sums(hidden: jax.Array, kernel: jax.Array, plan: HeadPlan, batch: NoisyBatch, *,
              weights: jax.Array | None = None, shift: bool = True) -> LossSums:
    """Scores `hidden` [batch, length, embed] against the batch's targets, where it says.

    Args:
      kernel: of the head, [vocab, embed] or [embed, vocab] as `plan` says.
      weights: float32 [batch, length], of each position's cross-entropy in what is minimised; None: the bound's.
      shift: logits at n - 1 predict token n (the AR alignment, kept); position 0 is then never scored.
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
    """-log p of each target in nats: [..., vocab] and int [...] to float32 [...]."""
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def top1_correct(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """1 where the target is the likeliest token, else 0: [..., vocab] and int [...] to float32 [...]."""
    return (jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32)


def token_nll(hidden: jax.Array, unembed: Unembed, targets: jax.Array, wanted: jax.Array | None = None, *,
              shift: bool = True, chunk_size: int = 128, measure: Measure = cross_entropy) -> jax.Array:
    """Cross-entropy of int `targets`, float32 [batch, length] in nats each; not differentiable.

    Args:
      measure: what is made of logits and targets in its place.
      wanted: bool [batch, length], where it is computed; 0 comes out elsewhere, and at position 0 under `shift`. Each
        row's wanted positions are put first, and a loop visits as many chunks of columns as the fullest row needs:
        rows stay on their devices, however they are spread.
      chunk_size: positions of each row whose logits exist at one time.
    """
    wanted = jnp.ones(targets.shape, bool) if wanted is None else wanted
    if shift:
        wanted, targets = _shift(wanted, targets)
    size = min(chunk_size, targets.shape[1])
    order = jnp.argsort(~wanted, axis=1, stable=True)

    def visit(index: jax.Array, nll: jax.Array) -> jax.Array:
        at = jax.lax.dynamic_slice_in_dim(order, index * size, size, axis=1)  # the last may repeat what was before
        logits = unembed(jnp.take_along_axis(hidden, at[..., None], axis=1))  # [batch, size, vocab]
        found = measure(logits, jnp.take_along_axis(targets, at, axis=1))
        return jax.lax.dynamic_update_slice_in_dim(nll, found, index * size, axis=1)

    num_chunks = -(-jnp.max(jnp.sum(wanted, axis=1)) // size)
    nll = jax.lax.fori_loop(0, num_chunks, visit, jnp.zeros(targets.shape, jnp.float32))
    nll = jnp.where(wanted, jnp.take_along_axis(nll, jnp.argsort(order, axis=1), axis=1), 0.0)
    return jnp.roll(nll, 1, axis=1) if shift else nll


def _shift(loss_mask: jax.Array, *others: jax.Array) -> list[jax.Array]:
    """Each [batch, length], moved to the position whose state predicts it; nothing predicts position 0.

    The one place of the loss where the AR alignment is undone, on small arrays: the states stay where they are.
    """
    loss_mask = loss_mask & (jnp.arange(loss_mask.shape[1]) > 0)
    return [jnp.roll(x, -1, axis=1) for x in (loss_mask, *others)]
