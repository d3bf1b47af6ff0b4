"""Reveal policies: which of the still masked positions are filled in at each step.

A policy either goes by chance, so that a step knows what it reveals before the network runs and the head runs only
there; or it scores a candidate token at every masked position and reveals the best. To add one, write its score and
name it in `POLICIES`.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Policy:
    """What tells policies apart.

    Attributes:
      score: `score(logits [..., vocab], token [...])` gives a float [...], and the highest are revealed; None: by
        chance.
      independent: every position draws its step by itself, so that the counts vary: the ancestral process, which
        the release runs. Otherwise each step has its count.
      paced: whether it takes 64 steps where their number is not given; otherwise one step a token at most.
    """

    score: Callable[[jax.Array, jax.Array], jax.Array] | None = None
    independent: bool = False
    paced: bool = True


def probability(logits: jax.Array, token: jax.Array) -> jax.Array:
    """The log-probability of the candidate under the network itself, before temperature and cut-offs."""
    chosen = jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def margin(logits: jax.Array, token: jax.Array) -> jax.Array:
    """By how much the likeliest token's probability exceeds the second's (arXiv 2502.06768)."""
    del token
    first, second = jnp.moveaxis(jax.lax.top_k(logits, 2)[0], -1, 0)
    total = jax.nn.logsumexp(logits, axis=-1)
    return jnp.exp(first - total) - jnp.exp(second - total)


def negative_entropy(logits: jax.Array, token: jax.Array) -> jax.Array:
    """The sum of p log p in nats: how concentrated the prediction is."""
    del token
    log_p = jax.nn.log_softmax(logits, axis=-1)
    return jnp.where(log_p > -jnp.inf, jnp.exp(log_p) * log_p, 0).sum(axis=-1)


POLICIES = {
    "random": Policy(independent=True),
    "random_exact": Policy(),
    "first_hitting": Policy(paced=False),
    "confidence": Policy(probability),
    "margin": Policy(margin),
    "entropy": Policy(negative_entropy),
    "threshold": Policy(probability, paced=False),
    "autoregressive": Policy(probability, paced=False),  # not by denoising: see autoregressive.py
}
