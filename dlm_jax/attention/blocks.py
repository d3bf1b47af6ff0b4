"""Text in blocks that are written one after another, and the masks that follow from it."""

import dataclasses
from typing import Literal

import jax

from dlm_jax.attention.mask import AttentionMask
from dlm_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How a model of block diffusion takes a text: in blocks counted from its beginning, each given those before it.

    Attributes:
      size: tokens in a block.
      clean: how the tokens of a block that is written see each other: "causal", as the AR parent has it (NBDiff, arXiv
        2512.06776), or "whole", as while it is being written (BD3-LM, arXiv 2503.09573; SDAR, arXiv 2510.06303;
        Fast-dLLM v2, arXiv 2509.26328). Either way a clean block sees all clean ones before it.

    Raises:
      ConfigError: there are no such blocks.
    """

    size: int
    clean: Literal["causal", "whole"] = "causal"

    def __post_init__(self) -> None:
        if not isinstance(self.size, int) or self.size < 1:
            raise ConfigError(f"blocks have at least 1 token, got a block size of {self.size!r}")
        if self.clean not in ("causal", "whole"):
            raise ConfigError(f"clean blocks are read causal or whole, not {self.clean!r}")

    def learning(self, text_length: int, views: int = 1) -> AttentionMask:
        """For noised copies of a text and a clean one behind them, each of `text_length` positions."""
        return AttentionMask.block_diffusion(self.size, text_length, views, whole_clean=self.clean == "whole")

    def reading(self) -> AttentionMask:
        """For text that is clean, up to the end of its last whole block."""
        return AttentionMask.block_causal(self.size) if self.clean == "whole" else AttentionMask.causal()

    def writing(self, begin: jax.Array) -> AttentionMask:
        """For rows whose blocks that begin at `begin` int [batch] are being written, and which are clean before."""
        return AttentionMask.block_causal(self.size, None if self.clean == "whole" else begin)
