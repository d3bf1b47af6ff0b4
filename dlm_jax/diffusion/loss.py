"""From hidden states to the bound: cross-entropy in chunks, so that no [batch, length, vocab] array exists.

Sums come out unnormalised and additive, so that micro-batches and devices add them and one division ends the step.
"""

import dataclasses
from collections.abc import Callable
from typing import Self

import jax
import jax.numpy as jnp

from dlm_jax.diffusion.corruption import CorruptedBatch

Unembed = Callable[[jax.Array], jax.Array]  # hidden states [..., embed] -> float32 logits [..., vocab]

NORMALISERS = ("maskable", "masked")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossSums:
    """Float32 scalars summed over positions; adds up over micro-batches.

    Attributes:
      weighted_nll: weights x cross-entropy over the scored positions, nats.
      nll: cross-entropy over the scored positions, nats.
      correct: how many scored positions have the target as their likeliest token.
      scored: how many positions were scored.
      maskable: how many positions could have been.
    """

    weighted_nll: jax.Array
    nll: jax.Array
    correct: jax.Array
    scored: jax.Array
    maskable: jax.Array

    @classmethod
    def zero(cls) -> Self:
        return cls(*(jnp.float32(0) for _ in dataclasses.fields(cls)))

    def __add__(self, other: Self) -> Self:
        return jax.tree.map(jnp.add, self, other)

    def normaliser(self, name: str) -> jax.Array:
        """What the weighted sum is divided by, at least 1.

        "maskable" makes the loss an unbiased estimate of the bound in nats per token, whatever the batch size.
        "masked" is the release's form, for comparison; its value depends on how a batch is cut up.
        """
        return jnp.maximum(self.maskable if name == "maskable" else self.scored, 1.0)


def loss_sums(hidden: jax.Array, unembed: Unembed, batch: CorruptedBatch, *, shift: bool = True,
              chunk_size: int = 128) -> LossSums:
    """Scores `hidden` [batch, length, embed] against the batch's targets.

    Args:
      shift: logits at n - 1 predict token n (the AR alignment, kept); position 0 is then never scored.
      chunk_size: positions along the length whose logits exist at one time.
    """
    scored = batch.scored
    if shift:
        scored = scored.at[:, 0].set(False)
    nll, correct = _token_scores(hidden, unembed, batch.targets, shift, chunk_size)
    total = lambda x: jnp.sum(jnp.where(scored, x, 0.0), dtype=jnp.float32)  # noqa: E731
    return LossSums(weighted_nll=total(batch.weights * nll), nll=total(nll), correct=total(correct), scored=total(1.0),
                    maskable=jnp.sum(batch.maskable, dtype=jnp.float32))


def token_nll(hidden: jax.Array, unembed: Unembed, targets: jax.Array, *, shift: bool = True,
              chunk_size: int = 128) -> jax.Array:
    """Cross-entropy of int `targets`, float32 [batch, length] in nats each; 0 at position 0 under `shift`."""
    nll, _ = _token_scores(hidden, unembed, targets, shift, chunk_size)
    return nll.at[:, 0].set(0.0) if shift else nll


def _token_scores(hidden: jax.Array, unembed: Unembed, targets: jax.Array, shift: bool,
                  chunk_size: int) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy and correctness, float32 [batch, length], aligned with `targets`; column 0 is void under shift."""
    if shift:  # the loss's one place where the AR alignment is undone
        targets = jnp.roll(targets, -1, axis=1)
    batch, length, _ = hidden.shape
    num_chunks = -(-length // chunk_size)
    padding = num_chunks * chunk_size - length if num_chunks > 1 else 0

    @jax.checkpoint  # the backward pass makes each chunk's logits again instead of keeping them
    def score(hidden: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = unembed(hidden)  # [batch, chunk, vocab]
        target_logit = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        nll = jax.nn.logsumexp(logits, axis=-1) - target_logit
        return nll, (target_logit >= jnp.max(jax.lax.stop_gradient(logits), axis=-1)).astype(jnp.float32)

    if num_chunks == 1:
        nll, correct = score(hidden, targets)
    else:
        pad = lambda x: jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))  # noqa: E731
        chunks = lambda x: jnp.moveaxis(pad(x).reshape(batch, num_chunks, chunk_size, *x.shape[2:]), 1, 0)  # noqa: E731
        scores = jax.lax.map(lambda chunk: score(*chunk), (chunks(hidden), chunks(targets)))
        nll, correct = (jnp.moveaxis(x, 0, 1).reshape(batch, -1)[:, :length] for x in scores)
    return (jnp.roll(nll, 1, axis=1), jnp.roll(correct, 1, axis=1)) if shift else (nll, correct)
