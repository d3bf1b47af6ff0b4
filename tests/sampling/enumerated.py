"""Models of joint distributions small enough to enumerate, and the exact law of what a sampler makes of them."""

import collections
import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from scipy import stats

from dlm_jax.attention import AttentionMask
from tests.sampling.tiny_models import make_keys, run_sampler

_OFFSET = 1.5  # of all logits: some are positive and some are not


@dataclasses.dataclass(frozen=True)
class LogitsModelConfig:
    vocab_size: int


class LogitsModel(nnx.Module):
    """A model whose hidden states are its logits: `logits(tokens)` [batch, length, vocab], aligned with the tokens."""

    def __init__(self, logits, shift=True, vocab=None):
        self.logits, self.shift, self.config = logits, shift, LogitsModelConfig(vocab)

    def hidden(self, tokens, attention):
        logits = self.logits(tokens)
        return jnp.roll(logits, -1, axis=1) if self.shift else logits

    def unembed(self, hidden):
        return hidden


class JointDistribution:
    """A joint distribution of `length` tokens out of `vocab`, after a context token; the mask's id is `vocab`."""

    def __init__(self, vocab, length, seed=1):
        self.vocab, self.length, self.mask = vocab, length, vocab
        self.outcomes = np.array(list(itertools.product(range(vocab), repeat=length)))
        self.probability = np.random.default_rng(seed).dirichlet(np.full(len(self.outcomes), 0.3))

    def logits(self, tokens):
        """Returns log marginals given the unmasked tokens, plus a constant; and a spurious logit for the mask token."""
        seen = tokens[:, None, 1:]
        match = ((seen == self.outcomes) | (seen == self.mask)).all(-1)  # [batch, outcomes]
        weight = jnp.where(match, jnp.asarray(self.probability, jnp.float32), 0)
        one_hot = jax.nn.one_hot(self.outcomes, self.vocab)  # [outcomes, length, vocab]
        marginal = jnp.einsum("bo,olv->blv", weight, one_hot)
        logits = jnp.log(marginal / marginal.sum(-1, keepdims=True)) + _OFFSET
        return jnp.pad(logits, ((0, 0), (1, 0), (0, 1)), constant_values=5.0)

    def law(self, given=()):
        """Returns the probability of each outcome; gaps are the None of `given`, () for gaps everywhere."""
        match = np.all([(token is None) | (self.outcomes[:, n] == token) for n, token in enumerate(given)] or 1, axis=0)
        weight = self.probability * match
        return {tuple(outcome): p for outcome, p in zip(self.outcomes.tolist(), weight / weight.sum(), strict=True)}

    def marginals(self, state):
        """Returns the marginals [length, vocab] given `state`, a tuple of tokens and None."""
        match = np.all([(self.outcomes[:, n] == token) | (token is None) for n, token in enumerate(state)], axis=0)
        weight = self.probability * match / (self.probability * match).sum()
        return np.stack([np.bincount(self.outcomes[:, n], weight, self.vocab) for n in range(self.length)])


def truncated(p, temperature=1.0, top_p=None, top_k=None):
    """Applies temperature, top-k and top-p to probabilities `p` [vocab], by a sort."""
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


SCORES = {
    "confidence": lambda p, token: p[token],
    "margin": lambda p, token: np.diff(np.sort(p)[-2:])[0],
    "entropy": lambda p, token: (p * np.log(p)).sum(),
}


class ReferenceSampler:
    """Computes the law of a sampler on a `JointDistribution`, step by step.

    Args:
      policy: "random" (each masked position independently), "exact" (a fixed number of random positions), or one of
        SCORES (a fixed number of best candidates).
      blocks: for each block the positions of its gaps, and for every step how many of them are filled after it (for
        "random": the probability that a masked one is revealed).
      given: the given tokens, None in gaps.
      threshold: candidates of this probability are revealed whatever the number.
      penalty: the repetition penalty; `context` is the token at position 0.
    """

    def __init__(self, joint, policy, blocks, *, given=None, remask=0.0, threshold=np.inf, cfg_scale=0.0, penalty=1.0,
                 context=None, eos=None, eos_penalty=0.0, **choice):
        self.joint, self.policy, self.blocks, self.remask, self.threshold = joint, policy, blocks, remask, threshold
        self.given = given or (None,) * joint.length
        self.cfg_scale, self.penalty, self.context = cfg_scale, penalty, context
        self.eos, self.eos_penalty, self.choice = eos, eos_penalty, choice
        self.follow, self.predict = functools.cache(self._follow), functools.cache(self._predict)

    def law(self):
        """Returns the probability of every outcome."""
        return dict.fromkeys(map(tuple, self.joint.outcomes.tolist()), 0.0) | self.follow(self.given, 0, 0)

    def _follow(self, state, block, steps_in_block):
        """Returns the law of the outcomes of a state."""
        if block == len(self.blocks):
            return {state: 1.0}
        here, numbers = self.blocks[block]
        if all(state[n] is not None for n in here):
            return self.follow(state, block + 1, 0)
        law = collections.Counter()
        for weight, left in self._remask(state, here, steps_in_block + 1 == len(numbers)):
            masked = [n for n in here if left[n] is None]
            for chance, tokens in self._reveal(left, masked, numbers[steps_in_block], len(here) - len(masked)):
                then = tuple(tokens.get(n, token) for n, token in enumerate(left))
                for outcome, p in self.follow(then, block, steps_in_block + 1).items():
                    law[outcome] += weight * chance * p
        return law

    def _remask(self, state, here, last):
        filled = [n for n in here if state[n] is not None and self.remask and not last]
        for remasked in subsets(filled):
            weight = self.remask ** len(remasked) * (1 - self.remask) ** (len(filled) - len(remasked))
            yield weight, tuple(None if n in remasked else token for n, token in enumerate(state))

    def _reveal(self, state, masked, number, filled):
        p, sampled = self.predict(state)

        def candidates(positions):
            for tokens in itertools.product(range(self.joint.vocab), repeat=len(positions)):
                chance = np.prod([sampled[n][token] for n, token in zip(positions, tokens, strict=True)])
                if chance > 0:
                    yield chance, dict(zip(positions, tokens, strict=True))

        if self.policy == "random":
            for chosen in subsets(masked):
                weight = number ** len(chosen) * (1 - number) ** (len(masked) - len(chosen))
                yield from ((weight * chance, tokens) for chance, tokens in candidates(chosen) if weight)
            return
        count = max(number - filled, 1)
        if self.policy == "exact":
            ways = list(itertools.combinations(masked, count))
            for chosen in ways:
                yield from ((chance / len(ways), tokens) for chance, tokens in candidates(chosen))
            return
        for chance, tokens in candidates(masked):
            best = sorted(masked, key=lambda n: -SCORES[self.policy](p[n], tokens[n]))[:count]
            yield chance, {n: token for n, token in tokens.items() if n in best or p[n][token] >= self.threshold}

    def _predict(self, state):
        """Returns the probabilities for scores and those for sampling, each {masked position: [vocab]}."""
        masked = [n for n, token in enumerate(state) if token is None]
        logits = np.log(self.joint.marginals(state)[masked]) + _OFFSET
        if self.cfg_scale:
            hidden = tuple(token if given is None else None for token, given in zip(state, self.given, strict=True))
            blind = np.log(self.joint.marginals(hidden)[masked]) + _OFFSET
            logits = blind + (1 + self.cfg_scale) * (logits - blind)
        for token in {self.context, *state} - {None, self.joint.mask} if self.penalty != 1 else ():
            column = logits[:, token]
            logits[:, token] = np.where(column > 0, column / self.penalty, column * self.penalty)
        if self.eos is not None:
            logits[:, self.eos] -= self.eos_penalty
        p = np.exp(logits)
        p /= p.sum(axis=1, keepdims=True)
        return (dict(zip(masked, p, strict=True)),
                {n: truncated(row, **self.choice) for n, row in zip(masked, p, strict=True)})


def subsets(items):
    return itertools.chain.from_iterable(itertools.combinations(items, size) for size in range(len(items) + 1))


def assert_follows(law, samples):
    """Tests samples against a law by chi-square, with outcomes of few expected counts merged."""
    sampled = collections.Counter(map(tuple, np.asarray(samples).tolist()))
    assert all(law[row] > 0 for row in sampled)
    expected = np.array([p * len(samples) for p in law.values()])
    observed = np.array([sampled[row] for row in law])
    rare = expected < 10
    expected, observed = (np.append(x[~rare], x[rare].sum()) for x in (expected, observed))
    keep = expected > 0
    assert keep.sum() > 1
    assert stats.chisquare(observed[keep], expected[keep], sum_check=False).pvalue > 1e-4


def sample_short_texts(network, base, rows=6000, **settings):
    """Returns a sample of texts of three tokens out of five after a start, tested against the exact law of `base`.

    Args:
      network: what is sampled from left to right; its mask token is 5.
      base: the model whose law the texts must have.
      settings: of `run_sampler`; temperature, top-k and top-p also of the law.
    """
    tokens, fixed = np.tile([1, 3, 0, 0, 0], (rows, 1)), np.tile(np.arange(5) < 2, (rows, 1))
    found = run_sampler(network, tokens, fixed, policy="autoregressive", mask=5, keys=make_keys(rows, seed=3),
                        **settings)
    texts = np.array([[1, 3, *text] for text in itertools.product(range(5), repeat=3)])
    logits = jax.jit(lambda model, tokens: model(tokens, AttentionMask.causal()))(base, jnp.asarray(texts))
    p = np.exp(np.asarray(logits, np.float64)[:, 1:4, :5])
    choice = {name: settings[name] for name in ("temperature", "top_k", "top_p") if name in settings}
    p = np.apply_along_axis(truncated, -1, p / p.sum(axis=-1, keepdims=True), **choice)
    law = np.prod(np.take_along_axis(p, texts[:, 2:, None], axis=-1)[..., 0], axis=-1)
    np.testing.assert_allclose(law.sum(), 1, atol=1e-6)
    assert_follows(dict(zip(map(tuple, texts[:, 2:].tolist()), law, strict=True)), found.tokens[:, 2:])
    return found
