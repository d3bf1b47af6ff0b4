"""Reveal policies and the settings of a sampler.

A policy decides which masked positions a step reveals. A random policy chooses them before the network runs, so that
the LM head runs at those positions only; a scoring policy ranks a candidate token at every masked position and reveals
the best. To add a policy, write its score and name it in `POLICIES`.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp

from dlm_jax.config_fields import check_at_least, check_choices, check_range
from dlm_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Policy:
    """How a reveal policy chooses positions.

    Attributes:
      score: `score(logits [..., vocab], token [...])` returns float [...], and the highest are revealed; None for
        random positions.
      independent: each position chooses its step by itself, so that the number per step varies (the ancestral
        process of the DiffuLLaMA reference implementation). Otherwise each step has a fixed number.
      needs_num_steps: the number of steps defaults to 64. Otherwise it defaults to at most one step per token.
    """

    score: Callable[[jax.Array, jax.Array], jax.Array] | None = None
    independent: bool = False
    needs_num_steps: bool = True


def log_prob(logits: jax.Array, token: jax.Array) -> jax.Array:
    """Returns the log-probability of the candidate, before temperature, top-k and top-p."""
    chosen = jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def margin(logits: jax.Array, token: jax.Array) -> jax.Array:
    """Returns the largest probability minus the second largest (arXiv 2502.06768)."""
    del token
    first, second = jnp.moveaxis(jax.lax.top_k(logits, 2)[0], -1, 0)
    total = jax.nn.logsumexp(logits, axis=-1)
    return jnp.exp(first - total) - jnp.exp(second - total)


def negative_entropy(logits: jax.Array, token: jax.Array) -> jax.Array:
    """Returns the sum of p log p in nats; the highest values belong to the most concentrated predictions."""
    del token
    log_p = jax.nn.log_softmax(logits, axis=-1)
    return jnp.where(log_p > -jnp.inf, jnp.exp(log_p) * log_p, 0).sum(axis=-1)


POLICIES = {
    "random": Policy(independent=True),
    "random_exact": Policy(),
    "first_hitting": Policy(needs_num_steps=False),
    "confidence": Policy(log_prob),
    "margin": Policy(margin),
    "entropy": Policy(negative_entropy),
    "threshold": Policy(log_prob, needs_num_steps=False),
    "autoregressive": Policy(log_prob, needs_num_steps=False),  # by its own stepper, without denoising
}
BUILT_IN_DRAFTERS = ("none", "ngram", "self")
_DEFAULT_STEPS, _DEFAULT_THRESHOLD = 64, 0.9
_DENOISING_ONLY = ("num_steps", "step_schedule", "block_length", "threshold", "remask", "cfg_scale", "cache",
                   "cache_refresh_interval")


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """A reveal policy, a number of steps, and a token choice.

    Attributes:
      policy: which positions each step reveals, a key of `POLICIES`; "autoregressive" decodes from left to right
        under causal attention and has none of the settings of denoising steps.
      num_steps: steps from all masked to none. A row with fewer gaps than steps takes at most one step per gap. None:
        64; one per token for `first_hitting`; as many as it takes for `threshold`.
      step_schedule: "linear" reveals equally many tokens at each step, "cosine" few at first and many at the end.
        "dream" is that of Dream's sampler, see `spec.next_reveal`: with more steps than tokens it takes fewer passes.
      block_length: fill gaps from left to right in blocks of this many positions; None: the entire row at once.
      threshold: the probability at which the policy `threshold` reveals a token; None: 0.9. No other policy has one.
      remask: the probability, at each step but the last of a block, that a token revealed earlier in the block is
        masked again; the number revealed after each step does not change. Not for `random`, whose number varies.
      temperature: divides the logits; 0 takes the most likely token.
      top_p: sample from the fewest most likely tokens that reach this probability; None: from all.
      top_k: sample from the k most likely tokens; None: from all.
      repetition_penalty: divides the positive logits of tokens that the row already has and multiplies the negative
        ones (CTRL, arXiv 1909.05858); 1 for none.
      eos_penalty: nats subtracted from the logit of the end of text; inf: the text never ends.
      cfg_scale: w in l_0 + (1 + w) (l - l_0), where the logits l_0 do not see the given tokens (classifier-free
        guidance as in LLaDA, arXiv 2502.09992); 0 for none. It doubles the cost.
      cache: which keys and values outside the block are reused from step to step and grow stale (Fast-dLLM, arXiv
        2505.22618): "none", "prefix" for those before the block, "dual" also for those after it.
      cache_refresh_interval: steps in a block after which all are computed again; None: only at its first step.
      drafter: guesses tokens for autoregressive decoding, which then takes fewer passes for text of the same
        distribution (`sampling.speculative`). "ngram" looks them up in the text so far. With "self" a model guesses for
        itself, in the pass that checks what it guessed before. Else the place of a trained drafter: a workdir, a
        directory or a hub id.
      num_drafts: tokens that the drafter guesses at a time; None: 8 with "ngram", else a full block.
      draft_threshold: the confidence below which a trained drafter's guess, and all after it, are not checked; None:
        all are.
      draft_vocab_size: guesses are among as many tokens, the first of the vocabulary, which are its most frequent ones
        in most tokenizers (FR-Spec, arXiv 2502.14856); None: among all. The text has the same distribution.

    Raises:
      ConfigError: a setting is out of range or does not go with the policy.
    """

    policy: str = "confidence"
    num_steps: int | None = None
    step_schedule: Literal["linear", "cosine", "dream"] = "linear"
    block_length: int | None = None
    threshold: float | None = None
    remask: float = 0.0
    temperature: float = 1.0
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float = 1.0
    eos_penalty: float = 0.0
    cfg_scale: float = 0.0
    cache: Literal["none", "prefix", "dual"] = "none"
    cache_refresh_interval: int | None = None
    drafter: str = "none"
    num_drafts: int | None = None
    draft_threshold: float | None = None
    draft_vocab_size: int | None = None

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ConfigError(f"policy must be one of {', '.join(POLICIES)}, got {self.policy!r}")
        check_choices(self)
        for name in ("num_steps", "block_length", "top_k", "cache_refresh_interval", "num_drafts", "draft_vocab_size"):
            if getattr(self, name) is not None:
                check_at_least(getattr(self, name), 1, name)
        for name in ("top_p", "threshold", "draft_threshold"):
            if getattr(self, name) is not None:
                check_range(getattr(self, name), 0, 1, name, open_low=True)
        check_range(self.remask, 0, 1, "remask", open_high=True)
        check_range(self.temperature, 0, math.inf, "temperature", open_high=True)
        check_range(self.repetition_penalty, 0, math.inf, "repetition_penalty", open_low=True, open_high=True)
        check_range(self.cfg_scale, 0, math.inf, "cfg_scale", open_high=True)
        check_at_least(self.eos_penalty, 0, "eos_penalty")
        if self.policy == "autoregressive":
            for field in dataclasses.fields(self):
                if field.name in _DENOISING_ONLY and getattr(self, field.name) != field.default:
                    raise ConfigError(f"autoregressive decoding has no {field.name}; remove it")
        elif self.drafter != "none":
            raise ConfigError(f"a drafter guesses for autoregressive decoding, and the policy is {self.policy}; choose "
                              "autoregressive, or drafter=none")
        for name in ("num_drafts", "draft_threshold", "draft_vocab_size"):
            if getattr(self, name) is not None and self.drafter == "none":
                raise ConfigError(f"{name} is for a drafter, and there is none; name one, or remove {name}")
        if not self.drafter.strip():
            raise ConfigError("drafter is empty; give ngram, self, the place of a trained drafter, or none")
        if self.draft_threshold is not None and self.drafter in BUILT_IN_DRAFTERS:
            raise ConfigError(f"draft_threshold is for a trained drafter, and this one is {self.drafter}; remove it")
        if self.draft_vocab_size is not None and self.drafter == "ngram":
            raise ConfigError("draft_vocab_size is for a model that drafts, and this drafter is ngram; remove it")
        if self.threshold is not None and self.policy != "threshold":
            raise ConfigError(f"threshold belongs to the policy threshold, and the policy is {self.policy}")
        if self.remask and self.policy == "random":
            raise ConfigError("remask needs a policy with a fixed number of tokens per step, such as random_exact")
        if self.step_schedule != "linear" and self.steps is None:
            raise ConfigError(f"step_schedule={self.step_schedule} with the policy {self.policy} needs num_steps")
        if self.step_schedule == "dream":
            for name in ("remask", "cache"):
                if getattr(self, name) not in (0, "none"):
                    raise ConfigError(f"step_schedule=dream does not go with {name}; remove {name}, or choose linear")
        if self.cache != "none" and self.block_length is None:
            raise ConfigError(f"cache={self.cache} needs block_length, for example 32")
        if self.cache == "none" and self.cache_refresh_interval is not None:
            raise ConfigError("cache_refresh_interval needs cache=prefix or cache=dual")

    @property
    def structure(self) -> Self:
        """The settings that a sampling program is compiled for, the others at their defaults: see `RowSettings`."""
        numbers = ("threshold", "remask", "temperature", "top_p", "top_k", "repetition_penalty", "eos_penalty",
                   "cfg_scale")
        defaults = {field.name: field.default for field in dataclasses.fields(self) if field.name in numbers}
        return dataclasses.replace(self, **defaults)

    @property
    def steps(self) -> int | None:
        """The number of steps, defaults filled in; None: at most one per token."""
        return _DEFAULT_STEPS if self.num_steps is None and POLICIES[self.policy].needs_num_steps else self.num_steps

    @property
    def reveal_threshold(self) -> float | None:
        """The probability at which a token is revealed whatever the number; None for policies without one."""
        if self.policy != "threshold":
            return None
        return _DEFAULT_THRESHOLD if self.threshold is None else self.threshold


_NAMES = [field.name for field in dataclasses.fields(SamplerConfig)]
# Defaults that a policy does not have.
_NOT_OF_POLICY = {"autoregressive": _DENOISING_ONLY, "threshold": ("drafter",),
                  "first_hitting": ("num_steps", "step_schedule", "threshold", "drafter")}


def resolve_settings(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> SamplerConfig:
    """Returns the settings that a caller gives, None for those not given, completed by a model's own defaults.

    Without a policy, a drafter asks for autoregressive decoding, and a threshold for the policy `threshold`. Defaults
    that the policy does not have are left out.

    Raises:
      ConfigError: a name is not a setting, or a value is refused.
    """
    for name in (*given, *defaults):
        if name not in _NAMES:
            raise ConfigError(f"there is no sampling setting {name!r}; the settings are {', '.join(_NAMES)}")
    given = {name: value for name, value in given.items() if value is not None}
    policy = given.get("policy")
    if policy is None:
        implied = "threshold" if "threshold" in given else defaults.get("policy", SamplerConfig.policy)
        policy = "autoregressive" if given.get("drafter", "none") != "none" else implied
    omitted = _NOT_OF_POLICY.get(policy, ("threshold", "drafter"))
    kept = {name: value for name, value in defaults.items() if name not in omitted}
    return SamplerConfig(**kept | given | {"policy": policy})
