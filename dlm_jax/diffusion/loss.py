"""From hidden states to the bound: cross-entropy where a token was masked, never a [batch, length, vocab] array.

Sums come out unnormalised and additive, so that micro-batches and devices add them and one division ends the step.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Self

import jax
import jax.numpy as jnp

from dlm_jax.diffusion.corruption import CorruptedBatch
from dlm_jax.diffusion.head_loss import HeadPlan, head_loss

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
      scored: how many positions were scored.
      maskable: how many positions could have been.
      examples: how many rows have such a position.
    """

    loss: jax.Array
    weighted_nll: jax.Array
    nll: jax.Array
    correct: jax.Array
    scored: jax.Array
    maskable: jax.Array
    examples: jax.Array

    @classmethod
    def zero(cls) -> Self:
        return cls(*(jnp.float32(0) for _ in dataclasses.fields(cls)))

    def __add__(self, other: Self) -> Self:
        return jax.tree.map(jnp.add, self, other)

    def normaliser(self, name: str) -> jax.Array:
        """What the loss is divided by, at least 1.

        "maskable" makes the loss an unbiased estimate of the bound in nats per token, whatever the batch size.
        "masked" is the release's form, for comparison; its value depends on how a batch is cut up. "examples" goes
        with weights that are divided by each row's maskable tokens.
        """
        count = {"maskable": self.maskable, "masked": self.scored, "examples": self.examples}[name]
        return jnp.maximum(count, 1.0)


def loss_sums(hidden: jax.Array, kernel: jax.Array, plan: HeadPlan, batch: CorruptedBatch, *,
              weights: jax.Array | None = None, shift: bool = True) -> LossSums:
    """Scores `hidden` [batch, length, embed] against the batch's targets, where it says.

    Args:
      kernel: of the head, [vocab, embed] or [embed, vocab] as `plan` says.
      weights: float32 [batch, length], of each position's cross-entropy in what is minimised; None: the bound's.
      shift: logits at n - 1 predict token n (the AR alignment, kept); position 0 is then never scored.
    """
    targets, scored, bound_weights = batch.targets, batch.scored, batch.weights
    weights = bound_weights if weights is None else weights
    if shift:
        scored, targets, bound_weights, weights = _shift(scored, targets, bound_weights, weights)
    bound_weights, weights = (jnp.where(scored, x, 0.0) for x in (bound_weights, weights))
    loss, nll, correct = head_loss(hidden, kernel, targets, scored, weights, plan)
    total = functools.partial(jnp.sum, dtype=jnp.float32)
    return LossSums(loss=loss, weighted_nll=total(bound_weights * nll), nll=total(nll), correct=total(correct),
                    scored=total(scored), maskable=total(batch.maskable),
                    examples=total(batch.maskable.any(axis=1)))


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """-log p of each target in nats: [..., vocab] and int [...] to float32 [...]."""
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def is_likeliest(logits: jax.Array, targets: jax.Array) -> jax.Array:
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


def _shift(scored: jax.Array, *others: jax.Array) -> list[jax.Array]:
    """Each [batch, length], moved to the position whose state predicts it; nothing predicts position 0.

    The one place of the loss where the AR alignment is undone, on small arrays: the states stay where they are.
    """
    scored = scored & (jnp.arange(scored.shape[1]) > 0)
    return [jnp.roll(x, -1, axis=1) for x in (scored, *others)]
