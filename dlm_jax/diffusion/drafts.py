"""What a drafter learns: to guess the tokens after anchors of a text as its target would write them.

An anchor is a place in a text where a block begins. The block's guess k, from 0 on, is for the token k + 1 places after
the anchor. The drafter's distribution is compared with that token, and with the target's own distribution given the
text before the token. Whatever the slots of a kind of drafter mean, guesses are counted alike here.

    Batch ── draft_blocks ──▶ DraftBlocks ──▶ target, drafter ──▶ states of guesses ── sum_chunks ──▶ DraftSums
             anchors, labels                                    [batch, A, D, embed]   draft_losses
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp

from dlm_jax.diffusion.config import DraftObjective
from dlm_jax.diffusion.corruption import Batch
from dlm_jax.random import ANCHORS, example_keys

CHUNK_GUESSES = 128  # of each row, whose logits exist at one time; at least one block


class DraftBlocks(NamedTuple):
    """Blocks of `D` guesses at `A` places of each row.

    Attributes:
      anchors: int32 [batch, A], where they begin, in ascending order, those without any guess that counts at the end.
      labels: int32 [batch, A, D], the tokens to guess.
      previous: int32 [batch, A, D], the token before each of them; for the first it is the anchor's.
      counted: bool [batch, A, D], the guesses that count: those before the first token of a block that is not scored.
      states: int32 [batch, A, D], where in the text the target's state is that predicts the same token.
    """

    anchors: jax.Array
    labels: jax.Array
    previous: jax.Array
    counted: jax.Array
    states: jax.Array


def draft_blocks(objective: DraftObjective, batch: Batch, num_drafts: int, *, seed: int) -> DraftBlocks:
    """Chooses the anchors of each row at random, as a function of (seed, example_index) alone.

    An anchor and the token after it must both be scored, and in one document. Each such place of a row is as likely,
    and is taken once; a row with fewer has fewer blocks.
    """
    length = batch.tokens.shape[1]
    count = min(objective.num_anchors, length)
    segments = jnp.zeros_like(batch.tokens) if batch.segment_ids is None else batch.segment_ids
    follows = segments[:, :-1] == segments[:, 1:]
    valid = jnp.pad(batch.noisable_mask[:, :-1] & batch.noisable_mask[:, 1:] & follows, ((0, 0), (0, 1)))
    keys = example_keys(seed, batch.example_index, ANCHORS)
    score = jnp.where(valid, jax.vmap(lambda key: jax.random.uniform(key, (length,)))(keys), -1.0)
    score, anchors = jax.lax.top_k(score, count)
    anchors = jnp.sort(jnp.where(score >= 0, anchors, length), axis=1)
    chosen, anchors = anchors < length, jnp.minimum(anchors, length - 1).astype(jnp.int32)

    def at(x: jax.Array, places: jax.Array) -> jax.Array:
        places = jnp.minimum(places, length - 1)
        return jnp.take_along_axis(x, places.reshape(len(x), -1), axis=1).reshape(places.shape)

    states = anchors[..., None] + jnp.arange(num_drafts)
    scored = at(batch.noisable_mask, states + 1) & (states + 1 < length)
    scored &= at(segments, states + 1) == at(segments, anchors)[..., None]
    counted = jnp.cumprod(scored, axis=-1).astype(bool) & chosen[..., None]
    return DraftBlocks(anchors, at(batch.tokens, states + 1), at(batch.tokens, states), counted,
                       jnp.minimum(states, length - 1))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DraftSums:
    """Sums over guesses, float32; they add up over micro-batches. Only `loss` has a gradient.

    Attributes:
      loss: what is minimized: the weighted losses of all guesses.
      weight: the sum of the guesses' weights, by which the loss is divided.
      nll: the drafter's cross-entropy, nats.
      correct: guesses whose label is the drafter's most likely token.
      counted: [D], guesses.
      accepted: [D], the probability that the target accepts a sampled guess, given that it accepts those before it: the
        sum over tokens of the smaller of both probabilities. None if the target's distribution is not computed; so too
        for the next ones.
      top_accepted: [D], the same of a drafter that takes its most likely token: its probability under the target.
      tokens, top_tokens: the tokens that a pass of the target gives, 1 and the guesses accepted before the first that
        is not, of blocks whose guesses all count.
      num_full: such blocks.
    """

    loss: jax.Array
    weight: jax.Array
    nll: jax.Array
    correct: jax.Array
    counted: jax.Array
    accepted: jax.Array | None
    top_accepted: jax.Array | None
    tokens: jax.Array | None
    top_tokens: jax.Array | None
    num_full: jax.Array | None

    @classmethod
    def zero(cls, num_drafts: int, *, target: bool) -> Self:
        """Returns no sums yet; `target`: with those that need the target's distribution."""
        zero, slots = jnp.float32(0), jnp.zeros(num_drafts, jnp.float32)
        of_target = (slots, slots, zero, zero, zero) if target else (None,) * 5
        return cls(zero, zero, zero, zero, slots, *of_target)

    def __add__(self, other: Self) -> Self:
        return jax.tree.map(jnp.add, self, other)

    def normalizer(self) -> jax.Array:
        """Returns what the loss is divided by, float32, not 0."""
        return jnp.where(self.weight > 0, self.weight, 1.0)

    def metrics(self) -> dict[str, jax.Array]:
        """Returns means over guesses, by slot too, and over blocks."""
        num_scored = jnp.sum(self.counted)
        scored = jnp.maximum(num_scored, 1.0)
        values = {"masked_nll": self.nll / scored, "accuracy": self.correct / scored, "masked_tokens": num_scored}
        if self.accepted is None:
            return values
        full, by_slot = jnp.maximum(self.num_full, 1.0), self.accepted / jnp.maximum(self.counted, 1.0)
        return values | {
            "acceptance": jnp.sum(self.accepted) / scored,
            "top_acceptance": jnp.sum(self.top_accepted) / scored,
            "tokens_per_pass": self.tokens / full,
            "top_tokens_per_pass": self.top_tokens / full,
        } | {f"acceptance_{slot + 1}": by_slot[slot] for slot in range(len(self.counted))}


class Guesses(NamedTuple):
    """The drafter's distributions, [..., D, ...] each.

    Attributes:
      logits: float32 [..., D, vocab].
      confidence: float32 [..., D], the log odds that a guess is accepted; None without a confidence head.
      candidates: int32 [..., D, k], among which a selector chooses; None without one.
      scores: float32 [..., D, k], the logits of that choice.
    """

    logits: jax.Array
    confidence: jax.Array | None = None
    candidates: jax.Array | None = None
    scores: jax.Array | None = None


def draft_losses(objective: DraftObjective, guesses: Guesses, target_logits: jax.Array | None, labels: jax.Array,
                 counted: jax.Array) -> DraftSums:
    """Returns the losses of blocks of guesses.

    With p of the drafter and q of the target, a guess adds to the loss its weight times the sum of: cross-entropy of
    the label; KL, sum q log(q / p); L1, sum |p - q|, which is twice the share of guesses that the target rejects; the
    confidence's binary cross-entropy against the share it accepts, 1 - L1 / 2, through which no gradient flows to p;
    and the selector's cross-entropy where the label is among the candidates. Each is times its factor of `objective`.

    Args:
      target_logits: float32 [..., D, vocab]; None if nothing needs the target's distribution.
      labels, counted: int32 and bool [..., D].
    """
    losses = jnp.zeros(labels.shape, jnp.float32)
    drafter = _distribution(guesses.logits)
    label_logits = jnp.take_along_axis(guesses.logits, labels[..., None], axis=-1)
    nll = (drafter.logsumexp - label_logits)[..., 0]
    weights = guess_weights(objective, nll, counted)
    losses += objective.cross_entropy * nll
    of_target = (None,) * 5
    if target_logits is not None:
        target, _, target_logsumexp = _distribution(target_logits)
        l1 = jnp.sum(jnp.abs(drafter.probs - target), axis=-1)
        losses += objective.l1 * l1
        if objective.kl:
            log_ratio = jnp.sum(target * (target_logits - guesses.logits), axis=-1)
            losses += objective.kl * (log_ratio + (drafter.logsumexp - target_logsumexp)[..., 0])
        if guesses.confidence is not None:
            accepted = jax.lax.stop_gradient(1.0 - l1 / 2)
            log_odds = guesses.confidence
            losses += objective.confidence * (jax.nn.softplus(log_odds) - accepted * log_odds)
        of_target = _acceptance(guesses, drafter.largest, target, l1, counted)
    if guesses.scores is not None:
        is_label = guesses.candidates == labels[..., None]
        chosen = jnp.sum(jnp.where(is_label, guesses.scores, 0.0), axis=-1)
        selection = jax.nn.logsumexp(guesses.scores, axis=-1) - chosen
        losses += objective.selector * jnp.where(is_label.any(axis=-1), selection, 0.0)

    def total(x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(counted, x, 0.0), dtype=jnp.float32)

    slots = tuple(range(labels.ndim - 1))
    correct = (label_logits >= drafter.largest)[..., 0]
    return DraftSums(total(weights * losses), total(weights), total(nll), total(correct),
                     jnp.sum(counted, axis=slots, dtype=jnp.float32), *of_target)


def guess_weights(objective: DraftObjective, nll: jax.Array, counted: jax.Array) -> jax.Array:
    """Returns the weights of guesses, float32 [..., D]: a later guess counts less, as it needs all earlier ones.

    Either exp(-k / decay) of guess k, or those of D-PACE: the expected number of guesses from k on that are accepted,
    if each is with probability (1 + p(label)) / 2.
    """
    if not objective.adaptive:
        return jnp.broadcast_to(jnp.exp(-jnp.arange(nll.shape[-1]) / objective.decay), nll.shape)
    smoothed = jax.lax.stop_gradient(0.5 * jnp.exp(-nll) + 0.5)
    reached = jnp.cumprod(jnp.where(counted, smoothed, 0.0), axis=-1)
    return jnp.flip(jnp.cumsum(jnp.flip(reached, axis=-1), axis=-1), axis=-1)


class _Distribution(NamedTuple):
    """Probabilities [..., vocab], and the largest logit and the logsumexp of the logits, [..., 1]."""

    probs: jax.Array
    largest: jax.Array
    logsumexp: jax.Array


def _distribution(logits: jax.Array) -> _Distribution:
    """Computes a softmax in few passes over the vocabulary, and without a division of each element."""
    largest = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    exp = jnp.exp(logits - largest)
    total = jnp.sum(exp, axis=-1, keepdims=True)
    return _Distribution(exp * (1.0 / total), largest, largest + jnp.log(total))


def _acceptance(guesses: Guesses, largest: jax.Array, target: jax.Array, l1: jax.Array,
                counted: jax.Array) -> tuple[jax.Array, ...]:
    """Returns the sums of `DraftSums` that need the target's distribution, float32 [..., D, vocab]."""
    if guesses.scores is None:
        accepted = 1.0 - l1 / 2
        top_accepted = jnp.max(jnp.where(guesses.logits >= largest, target, 0.0), axis=-1)  # faster than an argmax
    else:
        shared = jnp.minimum(jax.nn.softmax(guesses.scores, axis=-1), jnp.take_along_axis(
            target, guesses.candidates, axis=-1))
        accepted, best = jnp.sum(shared, axis=-1), jnp.argmax(guesses.scores, axis=-1)
        top = jnp.take_along_axis(guesses.candidates, best[..., None], axis=-1)
        top_accepted = jnp.take_along_axis(target, top, axis=-1)[..., 0]
    accepted, top_accepted = jax.lax.stop_gradient((accepted, top_accepted))
    is_full, slots = counted.all(axis=-1), tuple(range(counted.ndim - 1))

    def tokens(probabilities: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(is_full, 1.0 + jnp.sum(jnp.cumprod(probabilities, axis=-1), axis=-1), 0.0))

    by_slot = (jnp.sum(jnp.where(counted, x, 0.0), axis=slots) for x in (accepted, top_accepted))
    return *by_slot, tokens(accepted), tokens(top_accepted), jnp.sum(is_full, dtype=jnp.float32)


# (trained parameters, differentiable arrays, frozen parameters, other arrays) of some blocks -> their sums
ChunkSums = Callable[[Any, Any, Any, Any], DraftSums]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def sum_chunks(function: ChunkSums, zero: Callable[[], DraftSums], params: Any, moving: Any, frozen: Any,
               fixed: Any) -> DraftSums:
    """Sums `function` over a few blocks of each row at a time, so that their logits alone exist at that time.

    The gradient is computed in the same pass: the head then runs once and not twice.

    Args:
      function: it must not refer to arrays but its arguments.
      zero: what the sums start from.
      params, frozen: what all blocks share; the gradient is by `params`.
      moving, fixed: trees of arrays [batch, A, D, ...]; the gradient is by `moving`. `fixed["counted"]` says which
        guesses count; a few blocks of which none does are skipped.
    """
    return _sum_chunks(function, zero, params, moving, frozen, fixed, gradients=False)[0]


def _forward(function: ChunkSums, zero: Callable[[], DraftSums], params: Any, moving: Any, frozen: Any,
             fixed: Any) -> tuple[DraftSums, Any]:
    return _sum_chunks(function, zero, params, moving, frozen, fixed, gradients=True)


def _backward(function: ChunkSums, zero: Callable[[], DraftSums], gradients: Any, cotangents: DraftSums) -> tuple:
    params, moving = jax.tree.map(lambda x: (cotangents.loss * x).astype(x.dtype), gradients)
    return params, moving, None, None


sum_chunks.defvjp(_forward, _backward)


def _sum_chunks(function: ChunkSums, zero: Callable[[], DraftSums], params: Any, moving: Any, frozen: Any, fixed: Any,
                *, gradients: bool) -> tuple[DraftSums, Any]:
    """Returns the sums, and their gradients by `params` and `moving`, None unless `gradients`."""
    batch, blocks, drafts = fixed["counted"].shape
    count = -(-blocks // max(1, CHUNK_GUESSES // drafts))
    size = -(-blocks // count)

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, count * size - blocks), *[(0, 0)] * (x.ndim - 2)))
        return jnp.swapaxes(x.reshape(batch, count, size, *x.shape[2:]), 0, 1)

    def join(x: jax.Array) -> jax.Array:
        return jnp.swapaxes(x, 0, 1).reshape(batch, count * size, *x.shape[3:])[:, :blocks]

    def loss(params: Any, moving: Any, fixed: Any) -> tuple[jax.Array, DraftSums]:
        sums = function(params, moving, frozen, fixed)
        return sums.loss, sums

    def visit(carry: tuple[DraftSums, Any], chunk: tuple[Any, Any]) -> tuple[tuple[DraftSums, Any], Any]:
        def compute(moving: Any, fixed: Any) -> tuple[DraftSums, Any]:
            if not gradients:
                return function(params, moving, frozen, fixed), None
            grads, sums = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, moving, fixed)
            return sums, grads

        def skip(moving: Any, fixed: Any) -> tuple[DraftSums, Any]:
            return zero(), jax.tree.map(jnp.zeros_like, (params, moving)) if gradients else None

        sums, grads = jax.lax.cond(chunk[1]["counted"].any(), compute, skip, *chunk)
        of_params, of_moving = grads if gradients else (None, None)
        return jax.tree.map(jnp.add, carry, (sums, of_params)), of_moving

    start = zero(), jax.tree.map(jnp.zeros_like, params) if gradients else None
    (sums, of_params), of_moving = jax.lax.scan(visit, start, jax.tree.map(split, (moving, fixed)))
    return sums, (of_params, jax.tree.map(join, of_moving)) if gradients else None
