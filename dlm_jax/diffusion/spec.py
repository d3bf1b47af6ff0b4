"""What a diffusion language model needs besides its weights: mask token, shift, and the blocks it writes in."""

import dataclasses
from typing import Literal

import jax

from dlm_jax.attention.mask import AttentionMask
from dlm_jax.config_fields import check_at_least, check_choices
from dlm_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class BlockSpec:
    """The blocks of block diffusion, counted from the start of a text; each is written given the ones before it.

    Attributes:
      size: tokens per block.
      clean_attention: how the tokens of a finished block attend to each other. "causal": as in the AR parent (NBDiff,
        arXiv 2512.06776). "block_bidirectional": as while the block is being written (BD3-LM, arXiv 2503.09573; SDAR,
        arXiv 2510.06303; Fast-dLLM v2, arXiv 2509.26328). Either way a clean block attends to all clean ones before it.
      noise: what stands for tokens that are not known yet: the mask token, or random tokens (Uno). With the latter the
        model only drafts what its clean attention then checks.
      noised_attention: how the tokens of a block that is being written attend to each other. "causal": a draft does not
        depend on how many are made after it. Only beside a causal `clean_attention`.

    Raises:
      ConfigError: the size is less than 1, or the kinds of attention do not go together.
    """

    size: int
    clean_attention: Literal["causal", "block_bidirectional"] = "causal"
    noise: Literal["mask", "random_tokens"] = "mask"
    noised_attention: Literal["bidirectional", "causal"] = "bidirectional"

    def __post_init__(self) -> None:
        if not isinstance(self.size, int):  # as a config.json may have it
            raise ConfigError(f"blocks.size must be an integer, got {self.size!r}")
        check_at_least(self.size, 1, "blocks.size")
        check_choices(self, "blocks")
        if self._bidirectional and self.noised_attention == "causal":
            raise ConfigError("blocks.noised_attention causal needs blocks.clean_attention causal, got "
                              f"{self.clean_attention}")

    @property
    def _bidirectional(self) -> bool:
        return self.clean_attention == "block_bidirectional"

    def training_mask(self, text_length: int, views: int = 1) -> AttentionMask:
        """Returns the mask for `views` noisy copies of a text followed by a clean one, `text_length` positions each."""
        return AttentionMask.block_diffusion(self.size, text_length, views,
                                             bidirectional_clean=self._bidirectional,
                                             causal_blocks=self.noised_attention == "causal")

    def prefill_mask(self) -> AttentionMask:
        """Returns the mask for clean text, up to the end of its last full block."""
        return AttentionMask.block_causal(self.size) if self._bidirectional else AttentionMask.causal()

    def decode_mask(self, start: jax.Array) -> AttentionMask:
        """Returns the mask for rows that are clean before `start`, int [batch], where the current block begins."""
        if self.noised_attention == "causal":
            return AttentionMask.causal()
        return AttentionMask.block_causal(self.size, None if self._bidirectional else start)


@dataclasses.dataclass(frozen=True)
class DiffusionSpec:
    """What a diffusion language model needs besides its weights to be trained, sampled and scored.

    Attributes:
      mask_token_id: id of the mask token; None for an AR model that has none.
      shift: whether the logits at position n - 1 predict token n, as in the AR parent.
      blocks: the blocks that the model writes one after another; None for a model that sees the full row.
      missing_ids: the ids of the vocabulary that no token of the tokenizer has, such as rows that pad the embedding;
        they have no text and are never sampled.
    """

    mask_token_id: int | None
    shift: bool = True
    blocks: BlockSpec | None = None
    missing_ids: tuple[range, ...] = ()
