"""What the parent teaches: the divergence from its distribution, and the distance of hidden states from its own.

The parent reads the clean text causally. Its state at n - 1 knows the text before token n and predicts it. The model
reads a noised text, where its state at n - 1 (under the shift, else at n) predicts the same token: these two states
are compared. The functions of logits serve `fused_loss`, which sees a chunk of positions, and of the vocabulary one
device's shard: `reduce` adds up over the shards.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

Divergence = Literal["kl", "tv"]
Reduce = Callable[[Callable, jax.Array], jax.Array]  # (lax.psum or lax.pmax, x) -> x over the shards of the vocabulary


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TeacherStates:
    """The parent's states for each position of a noisy batch, and its head; no gradient reaches them.

    Attributes:
      hidden: [batch, length, embed], the input of the parent's head that predicts what the model's state does.
      kernel: of the parent's head, in the shape and the sharding of the model's.
      divergence: "kl", sum q log(q / p), or "tv", half of sum |p - q|.
    """

    hidden: jax.Array
    kernel: jax.Array
    divergence: Divergence = dataclasses.field(metadata={"static": True})


class DivergenceTerms(NamedTuple):
    """The divergence of each token and what its gradient needs, float32 [tokens] each.

    Attributes:
      value: nats for "kl"; 0 to 1 for "tv".
      teacher_logsumexp: of the parent's logits.
      mean_sign: for "tv" half of sum p sign(p - q); else 0.
    """

    value: jax.Array
    teacher_logsumexp: jax.Array
    mean_sign: jax.Array


def align_states(states: jax.Array, copies: int, *, shift: bool) -> jax.Array:
    """Returns the parent's states [batch, copies x length, ...] that predict what the model's do.

    Args:
      states: [batch, length, ...], of the clean text, causal: the state at n - 1 predicts token n.
      copies: of the text in the model's input, one after another.
      shift: whether the model's state at n - 1 predicts token n too; else it is the one at n.
    """
    states = lax.stop_gradient(states if shift else jnp.roll(states, 1, axis=1))
    return jnp.tile(states, (1, copies, *[1] * (states.ndim - 2)))


def hidden_distance(states: jax.Array, of_parent: jax.Array) -> jax.Array:
    """Returns 1 - cosine of states, in Repr-Align: [batch, length, embed] twice to float32 [batch, length]."""
    a, b = states.astype(jnp.float32), of_parent.astype(jnp.float32)
    # One root of the product of both squared norms, bounded from below: the gradient is finite at a state of zeros.
    norms = jnp.sum(a * a, axis=-1) * jnp.sum(b * b, axis=-1)
    return 1.0 - jnp.sum(a * b, axis=-1) * lax.rsqrt(jnp.maximum(norms, 1e-12))


def divergence_terms(kind: Divergence, logits: jax.Array, logsumexp: jax.Array, teacher_logits: jax.Array,
                     reduce: Reduce) -> DivergenceTerms:
    """Computes the divergence of logits [tokens, vocab] from the parent's, both float32."""
    top = reduce(lax.pmax, jnp.max(teacher_logits, axis=1))
    total = reduce(lax.psum, jnp.sum(jnp.exp(teacher_logits - top[:, None]), axis=1))
    teacher_logsumexp = top + jnp.log(total)
    log_p, log_q = logits - logsumexp[:, None], teacher_logits - teacher_logsumexp[:, None]
    q = jnp.exp(log_q)
    if kind == "kl":
        value = reduce(lax.psum, jnp.sum(q * (log_q - log_p), axis=1))
        return DivergenceTerms(value, teacher_logsumexp, jnp.zeros_like(value))
    p = jnp.exp(log_p)
    value = 0.5 * reduce(lax.psum, jnp.sum(jnp.abs(p - q), axis=1))
    return DivergenceTerms(value, teacher_logsumexp, 0.5 * reduce(lax.psum, jnp.sum(p * jnp.sign(p - q), axis=1)))


def divergence_dlogits(kind: Divergence, p: jax.Array, teacher_logits: jax.Array, terms: DivergenceTerms) -> jax.Array:
    """Computes the gradient of the divergence by the model's logits, [tokens, vocab], from its probabilities p."""
    q = jnp.exp(teacher_logits - terms.teacher_logsumexp[:, None])
    return p - q if kind == "kl" else p * (0.5 * jnp.sign(p - q) - terms.mean_sign[:, None])


def entropy(logits: jax.Array, logsumexp: jax.Array, reduce: Reduce) -> jax.Array:
    """Returns the entropy of a softmax in nats: [tokens, vocab] to float32 [tokens]."""
    p = jnp.exp(logits - logsumexp[:, None])
    return logsumexp - reduce(lax.psum, jnp.sum(p * logits, axis=1))


def entropy_dlogits(p: jax.Array, logits: jax.Array, logsumexp: jax.Array, value: jax.Array) -> jax.Array:
    """Computes the gradient of the entropy by the logits, [tokens, vocab]."""
    return -p * (logits - (logsumexp - value)[:, None])
