"""Reveal policies: which of the still masked positions are filled in at each step.

A policy either goes by chance, so that a step knows what it reveals before the network runs and the head runs only
there; or it scores a candidate token at every masked position and reveals the best. To add one, write its score and
name it in `POLICIES`.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from dlm_jax.errors import ConfigError


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
    needs_num_steps: bool = True


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
    "first_hitting": Policy(needs_num_steps=False),
    "confidence": Policy(probability),
    "margin": Policy(margin),
    "entropy": Policy(negative_entropy),
    "threshold": Policy(probability, needs_num_steps=False),
    "autoregressive": Policy(probability, needs_num_steps=False),  # not by denoising: see autoregressive.py
}


# ---- What a user chooses about sampling.


STEP_SCHEDULES = ("linear", "cosine")
CACHES = ("none", "prefix", "dual")
_STEPS = 64
_THRESHOLD = 0.9


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """A reveal policy, a number of steps, and a token choice.

    Attributes:
      policy: which positions are revealed at each step, a name in `policies.POLICIES`; "autoregressive" is from left
        to right under causal attention, which takes none of the settings of steps.
      num_steps: steps from all masked to none. A row with fewer gaps than steps takes one step a gap at most. None:
        64; for `first_hitting` one a token, and for `threshold` as many as it takes.
      step_schedule: "linear" reveals as many tokens at each step, "cosine" few at first and many at the end.
      block_length: fill gaps from left to right in blocks of this many positions; None: the whole row at once.
      threshold: the probability at which `threshold` reveals a token; 0.9 where None. No other policy has one.
      remask: the chance, at each step but a block's last, that a token revealed earlier in the block is masked again;
        the counts of the steps stay as they are. Not for `random`, which keeps no counts.
      temperature: divides the logits; 0 takes the likeliest token.
      top_p: draw only from the likeliest tokens that together reach this probability; None for all.
      top_k: draw only from the k likeliest tokens; None for all.
      repetition_penalty: divides the positive logits of tokens that the row already holds and multiplies the negative
        ones (CTRL, arXiv 1909.05858); 1 for none.
      eos_penalty: taken off the logit of the end of text, in nats; inf: it is never drawn.
      cfg_scale: w in l_0 + (1 + w) (l - l_0), where the logits l_0 do not see the given tokens (classifier-free
        guidance as in LLaDA, arXiv 2502.09992); 0 for none. It doubles the work.
      cache: which keys and values outside the block are kept from step to step, and so grow stale (Fast-dLLM, arXiv
        2505.22618): "none", "prefix" those before the block, "dual" those behind it as well.
      cache_refresh_interval: after how many steps of a block all are computed anew; None: only at its start.
    """

    policy: str = "confidence"
    num_steps: int | None = None
    step_schedule: str = "linear"
    block_length: int | None = None
    threshold: float | None = None
    remask: float = 0.0
    temperature: float = 1.0
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float = 1.0
    eos_penalty: float = 0.0
    cfg_scale: float = 0.0
    cache: str = "none"
    cache_refresh_interval: int | None = None

    def __post_init__(self) -> None:
        for name, choices in (("policy", POLICIES), ("step_schedule", STEP_SCHEDULES), ("cache", CACHES)):
            if getattr(self, name) not in choices:
                raise ConfigError(f"unknown {_NAMES.get(name, name)} {getattr(self, name)!r}; choose one of "
                                  f"{', '.join(choices)}")
        for name in ("num_steps", "block_length", "top_k", "cache_refresh_interval"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name, fine, wanted in (
                ("temperature", 0 <= self.temperature < math.inf, "be 0 (take the likeliest token) or positive"),
                ("top_p", self.top_p is None or 0 < self.top_p <= 1, "lie in (0, 1]"),
                ("threshold", self.threshold is None or 0 < self.threshold <= 1, "lie in (0, 1]"),
                ("remask", 0 <= self.remask < 1, "lie in [0, 1)"),
                ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "be positive"),
                ("eos_penalty", self.eos_penalty >= 0, "be 0 or positive"),
                ("cfg_scale", 0 <= self.cfg_scale < math.inf, "be 0 or positive")):
            if not fine:
                raise ConfigError(f"{name} must {wanted}, got {getattr(self, name)}")
        if self.policy == "autoregressive":
            for field in dataclasses.fields(self):
                if field.name in _DENOISING and getattr(self, field.name) != field.default:
                    raise ConfigError(f"autoregressive decoding has no {field.name}; leave it out")
        if self.threshold is not None and self.policy != "threshold":
            raise ConfigError(f"threshold belongs to the policy threshold, and the policy is {self.policy}")
        if self.remask and self.policy == "random":
            raise ConfigError("remask needs a policy that keeps to counts, such as random_exact; random does not")
        if self.step_schedule == "cosine" and not POLICIES[self.policy].needs_num_steps and self.num_steps is None:
            raise ConfigError(f"the cosine step_schedule needs num_steps, and {self.policy} goes without")
        if self.cache != "none" and self.block_length is None:
            raise ConfigError(f"the {self.cache} cache keeps what lies outside a block; set block_length, 32 say")
        if self.cache == "none" and self.cache_refresh_interval is not None:
            raise ConfigError("cache_refresh_interval belongs to a cache; set cache to prefix or dual")

    @property
    def steps(self) -> int | None:
        """The number of steps in force; None: one a token at most."""
        return _STEPS if self.num_steps is None and POLICIES[self.policy].needs_num_steps else self.num_steps

    @property
    def reveal_threshold(self) -> float | None:
        """The probability from which a token is revealed whatever the count; None where the policy has none."""
        if self.policy != "threshold":
            return None
        return _THRESHOLD if self.threshold is None else self.threshold


def sampler_config(**settings) -> SamplerConfig:
    """A `SamplerConfig` from keywords.

    Raises:
      ConfigError: a keyword is not one of its settings.
    """
    known = [field.name for field in dataclasses.fields(SamplerConfig)]
    for name in settings:
        if name not in known:
            raise ConfigError(f"there is no sampling setting {name!r}; the settings are {', '.join(known)}")
    return SamplerConfig(**settings)


_NAMES = {"policy": "reveal policy", "step_schedule": "step schedule"}
_DENOISING = ("num_steps", "step_schedule", "block_length", "threshold", "remask", "cfg_scale", "cache", "cache_refresh_interval")
