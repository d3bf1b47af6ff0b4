"""What a diffusion model is beside its weights: mask token, shift, and the blocks of block diffusion with their masks."""

import dataclasses
from typing import Literal

import jax

from dlm_jax.attention.mask import AttentionMask
from dlm_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class BlockSpec:
    """How a model of block diffusion takes a text: in blocks counted from its beginning, each given those before it.

    Attributes:
      size: tokens in a block.
      clean_attention: how the tokens of a block that is written see each other: "causal", as the AR parent has it (NBDiff, arXiv
        2512.06776), or "block_bidirectional", as while it is being written (BD3-LM, arXiv 2503.09573; SDAR, arXiv 2510.06303;
        Fast-dLLM v2, arXiv 2509.26328). Either way a clean block sees all clean ones before it.

    Raises:
      ConfigError: there are no such blocks.
    """

    size: int
    clean_attention: Literal["causal", "block_bidirectional"] = "causal"

    def __post_init__(self) -> None:
        if not isinstance(self.size, int) or self.size < 1:
            raise ConfigError(f"blocks have at least 1 token, got a block size of {self.size!r}")
        if self.clean_attention not in ("causal", "block_bidirectional"):
            raise ConfigError(f"clean blocks are read causal or whole, not {self.clean_attention!r}")

    def training_mask(self, text_length: int, views: int = 1) -> AttentionMask:
        """For noised copies of a text and a clean one behind them, each of `text_length` positions."""
        return AttentionMask.block_diffusion(self.size, text_length, views, block_bidirectional_clean=self.clean_attention == "block_bidirectional")

    def prefill_mask(self) -> AttentionMask:
        """For text that is clean, up to the end of its last whole block."""
        return AttentionMask.block_causal(self.size) if self.clean_attention == "block_bidirectional" else AttentionMask.causal()

    def decode_mask(self, begin: jax.Array) -> AttentionMask:
        """For rows whose blocks that begin at `begin` int [batch] are being written, and which are clean before."""
        return AttentionMask.block_causal(self.size, None if self.clean_attention == "block_bidirectional" else begin)


@dataclasses.dataclass(frozen=True)
class DiffusionSpec:
    """What a diffusion language model needs beside its weights to be trained, sampled and scored.

    Attributes:
      mask_token_id: id of the mask token; None for an AR model that has none.
      shift: whether the logits at position n - 1 predict token n, as in the AR parent.
      blocks: the blocks that the model writes one after another; None for a model that sees whole rows.
    """

    mask_token_id: int | None
    shift: bool = True
    blocks: BlockSpec | None = None
