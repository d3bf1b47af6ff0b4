"""Reveal policies: which of the still masked positions are filled in at each step.

A policy is one of two kinds. `Planned` does not look at the network's output, so the whole order is drawn
before the first step and the head runs only where a token is about to be revealed. `Ranked` scores a
candidate token at every masked position and reveals the best. To add a policy, write its function and
name it in `POLICIES`.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Planned:
    """`plan(key, masked [length], num_steps)` gives the step in [0, num_steps) at which each position is revealed."""

    plan: Callable[[jax.Array, jax.Array, int], jax.Array]


@dataclasses.dataclass(frozen=True)
class Ranked:
    """`score(logits [..., vocab], token [...])` gives a float [...]; the highest are revealed, `quota` at each step."""

    score: Callable[[jax.Array, jax.Array], jax.Array]


def random_plan(key: jax.Array, masked: jax.Array, num_steps: int) -> jax.Array:
    """The ancestral process: an independent, uniform step for each position, int32 [length].

    It is the release's loop, drawn at once: revealing each masked token with probability 1/(t+1) for
    t = num_steps-1, ..., 1 and the rest at the end gives every token each step with probability 1/num_steps.
    """
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(masked.shape[0]))  # padding changes nothing
    return jax.vmap(lambda k: jax.random.randint(k, (), 0, num_steps))(keys)


def token_probability(logits: jax.Array, token: jax.Array) -> jax.Array:
    """The log-probability of the candidate under the network itself, before temperature and cut-offs."""
    chosen = jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def quota(step: jax.Array, total: jax.Array, num_steps: int) -> jax.Array:
    """How many of a row's `total` gaps step number `step` reveals: even shares, no remainder left for the end.

    Rows with fewer gaps than steps reveal one a step and are done early, as no forward pass need reveal nothing.
    """
    steps = jnp.clip(total, 1, num_steps)
    return (step + 1) * total // steps - step * total // steps


POLICIES: dict[str, Planned | Ranked] = {
    "random": Planned(random_plan),
    "confidence": Ranked(token_probability),
}
