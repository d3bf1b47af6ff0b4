"""What a user chooses about sampling."""

import dataclasses
import math

from dlm_jax.errors import ConfigError
from dlm_jax.sampling.policies import POLICIES

GRIDS = ("linear", "cosine")
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
      grid: "linear" reveals as many tokens at each step, "cosine" few at first and many at the end.
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
      guidance: w in l_0 + (1 + w) (l - l_0), where the logits l_0 do not see the given tokens (classifier-free
        guidance as in LLaDA, arXiv 2502.09992); 0 for none. It doubles the work.
      cache: which keys and values outside the block are kept from step to step, and so grow stale (Fast-dLLM, arXiv
        2505.22618): "none", "prefix" those before the block, "dual" those behind it as well.
      refresh_every: after how many steps of a block all are computed anew; None: only at its start.
    """

    policy: str = "confidence"
    num_steps: int | None = None
    grid: str = "linear"
    block_length: int | None = None
    threshold: float | None = None
    remask: float = 0.0
    temperature: float = 1.0
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float = 1.0
    eos_penalty: float = 0.0
    guidance: float = 0.0
    cache: str = "none"
    refresh_every: int | None = None

    def __post_init__(self) -> None:
        for name, choices in (("policy", POLICIES), ("grid", GRIDS), ("cache", CACHES)):
            if getattr(self, name) not in choices:
                raise ConfigError(f"unknown {_NAMES.get(name, name)} {getattr(self, name)!r}; choose one of "
                                  f"{', '.join(choices)}")
        for name in ("num_steps", "block_length", "top_k", "refresh_every"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name, fine, wanted in (
                ("temperature", 0 <= self.temperature < math.inf, "be 0 (take the likeliest token) or positive"),
                ("top_p", self.top_p is None or 0 < self.top_p <= 1, "lie in (0, 1]"),
                ("threshold", self.threshold is None or 0 < self.threshold <= 1, "lie in (0, 1]"),
                ("remask", 0 <= self.remask < 1, "lie in [0, 1)"),
                ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "be positive"),
                ("eos_penalty", self.eos_penalty >= 0, "be 0 or positive"),
                ("guidance", 0 <= self.guidance < math.inf, "be 0 or positive")):
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
        if self.grid == "cosine" and not POLICIES[self.policy].paced and self.num_steps is None:
            raise ConfigError(f"the cosine grid needs num_steps, and {self.policy} goes without")
        if self.cache != "none" and self.block_length is None:
            raise ConfigError(f"the {self.cache} cache keeps what lies outside a block; set block_length, 32 say")
        if self.cache == "none" and self.refresh_every is not None:
            raise ConfigError("refresh_every belongs to a cache; set cache to prefix or dual")

    @property
    def steps(self) -> int | None:
        """The number of steps in force; None: one a token at most."""
        return _STEPS if self.num_steps is None and POLICIES[self.policy].paced else self.num_steps

    @property
    def certain(self) -> float | None:
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


_NAMES = {"policy": "reveal policy", "grid": "time grid"}
_DENOISING = ("num_steps", "grid", "block_length", "threshold", "remask", "guidance", "cache", "refresh_every")
