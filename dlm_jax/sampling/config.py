"""What a user chooses about sampling."""

import dataclasses

from dlm_jax.errors import ConfigError
from dlm_jax.sampling.policies import POLICIES


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """A reveal policy, a number of steps, and a token choice.

    Attributes:
      policy: which positions are revealed at each step, a name in `policies.POLICIES`.
      num_steps: steps from all masked to none. A row with fewer gaps than steps takes one step a gap at most.
      temperature: divides the logits; 0 takes the likeliest token.
      top_p: draw only from the likeliest tokens that together reach this probability; None for all.
      top_k: draw only from the k likeliest tokens; None for all.
    """

    policy: str = "confidence"
    num_steps: int = 64
    temperature: float = 1.0
    top_p: float | None = None
    top_k: int | None = None

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ConfigError(f"unknown reveal policy {self.policy!r}; choose one of {', '.join(POLICIES)}")
        if self.num_steps < 1:
            raise ConfigError(f"num_steps must be at least 1, got {self.num_steps}")
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature must be 0 (take the likeliest token) or positive, got {self.temperature}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must lie in (0, 1], got {self.top_p}")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k must be at least 1, got {self.top_k}")
