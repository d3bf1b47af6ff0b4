"""How a diffusion model writes the texts that `dlm evaluate` judges: on tasks, on examples and in the harness."""

import argparse
from typing import TYPE_CHECKING

from dlm_jax.errors import ConfigError

if TYPE_CHECKING:
    from dlm_jax.sampling import SamplerConfig

FLAGS = ("num_steps", "policy", "threshold", "block_length")


def add_arguments(parser: argparse._ArgumentGroup) -> None:
    """What is not given stays None; `evaluate` knows the defaults."""
    parser.add_argument("--num_steps", type=int, help="forward passes for each text that is written (default 64, for "
                        "the policy threshold as many as it takes, and at most one a token)")
    parser.add_argument("--policy", help="which tokens are revealed first, a policy of `dlm sample` (default: "
                        "confidence, the surest)")
    parser.add_argument("--threshold", type=float, help="the probability at which the policy threshold reveals "
                        "(default 0.9)")
    parser.add_argument("--block_length", type=int, help="write blocks of this many tokens from left to right")


def sampler_of(arguments: argparse.Namespace, autoregressive: bool = False) -> "SamplerConfig":
    """What the flags say, at the likeliest tokens.

    Raises:
      ConfigError: a value is wrong, or a flag is given and the model writes from left to right.
    """
    from dlm_jax.sampling import SamplerConfig

    if autoregressive:
        for name in FLAGS:
            if getattr(arguments, name) is not None:
                raise ConfigError(f"--{name} says how a diffusion model writes, and this one is evaluated from left to "
                                  "right; leave it out")
        return SamplerConfig("autoregressive", temperature=0.0)
    if arguments.policy == "autoregressive":
        raise ConfigError("--policy=autoregressive is how a diffusion model does not write; evaluate it from left to "
                          "right with --objective=autoregressive")
    return SamplerConfig(arguments.policy or SamplerConfig.policy, arguments.num_steps, threshold=arguments.threshold,
                         block_length=arguments.block_length, temperature=0.0)


def check_used(arguments: argparse.Namespace, writes: bool, where: str) -> None:
    """Raises ConfigError if a flag is given and nothing is written."""
    for name in FLAGS:
        if getattr(arguments, name) is not None and not writes:
            raise ConfigError(f"--{name} says how texts are written, and {where} asks for none; leave it out")
