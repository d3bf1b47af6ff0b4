"""Networks small enough to enumerate: each is told by its hidden states, which are already logits."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


class Toy(nnx.Module):
    """`logits(tokens [batch, length])` gives [batch, length, vocab], aligned with the position it predicts."""

    def __init__(self, logits, shift=True):
        self.logits, self.shift = logits, shift

    def hidden(self, tokens, attention):
        logits = self.logits(tokens)
        return jnp.roll(logits, -1, axis=1) if self.shift else logits

    def unembed(self, hidden):
        return hidden


class Joint:
    """A joint distribution of `length` tokens out of `vocab`, after a context token; the mask's id is `vocab`."""

    def __init__(self, vocab, length, seed):
        self.vocab, self.length, self.mask = vocab, length, vocab
        self.outcomes = np.array(list(itertools.product(range(vocab), repeat=length)))
        self.probability = np.random.default_rng(seed).dirichlet(np.full(len(self.outcomes), 0.3))

    def logits(self, tokens):
        """Log conditional marginals given the unmasked tokens; a spurious mass on the mask itself."""
        seen = tokens[:, None, 1:]
        match = ((seen == self.outcomes) | (seen == self.mask)).all(-1)  # [batch, outcomes]
        weight = jnp.where(match, jnp.asarray(self.probability, jnp.float32), 0)
        one_hot = jax.nn.one_hot(self.outcomes, self.vocab)  # [outcomes, length, vocab]
        marginal = jnp.einsum("bo,olv->blv", weight, one_hot)
        logits = jnp.log(marginal / marginal.sum(-1, keepdims=True))
        return jnp.pad(logits, ((0, 0), (1, 0), (0, 1)), constant_values=3.0)

    def law(self):
        return {tuple(outcome): p for outcome, p in zip(self.outcomes, self.probability, strict=True)}

    def marginals(self, state):
        """[length, vocab] given `state`, a tuple of tokens and None."""
        match = np.all([(self.outcomes[:, n] == token) | (token is None) for n, token in enumerate(state)], axis=0)
        weight = self.probability * match / (self.probability * match).sum()
        return np.stack([np.bincount(self.outcomes[:, n], weight, self.vocab) for n in range(self.length)])


def truncated(p, temperature=1.0, top_p=None, top_k=None):
    """The definition of temperature, top-k and top-p by a sort, for probabilities `p` [vocab]."""
    p = p ** (1 / temperature)
    p = p / p.sum()
    order = np.argsort(-p)
    if top_k is not None:
        p[order[top_k:]] = 0
        p = p / p.sum()
    if top_p is not None:
        before = np.cumsum(p[order]) - p[order]
        p[order[before >= top_p]] = 0
    return p / p.sum()


def random_law(joint, num_steps, **choice):
    """Exact law of the random policy: average over every plan, tokens of one step drawn independently."""
    law = dict.fromkeys(map(tuple, joint.outcomes), 0.0)

    def follow(state, plan, step, weight):
        if step == num_steps:
            law[state] += weight
            return
        here = [n for n in range(joint.length) if plan[n] == step]
        p = joint.marginals(state)
        for tokens in itertools.product(range(joint.vocab), repeat=len(here)):
            chance = np.prod([truncated(p[n], **choice)[token] for n, token in zip(here, tokens, strict=True)])
            if chance > 0:
                filled = list(state)
                for n, token in zip(here, tokens, strict=True):
                    filled[n] = token
                follow(tuple(filled), plan, step + 1, weight * chance)

    for plan in itertools.product(range(num_steps), repeat=joint.length):
        follow((None,) * joint.length, plan, 0, num_steps**-joint.length)
    return law


def confidence_law(joint, counts, **choice):
    """Exact law of the confidence policy that reveals counts[s] tokens at step s."""
    law = dict.fromkeys(map(tuple, joint.outcomes), 0.0)

    def follow(state, step, weight):
        masked = [n for n in range(joint.length) if state[n] is None]
        if not masked:
            law[state] += weight
            return
        p = joint.marginals(state)
        for tokens in itertools.product(range(joint.vocab), repeat=len(masked)):
            chance = np.prod([truncated(p[n], **choice)[token] for n, token in zip(masked, tokens, strict=True)])
            if chance > 0:
                best = sorted(zip(masked, tokens, strict=True), key=lambda pair: -p[pair])[: counts[step]]
                filled = list(state)
                for n, token in best:
                    filled[n] = token
                follow(tuple(filled), step + 1, weight * chance)

    follow((None,) * joint.length, 0, 1.0)
    return law
