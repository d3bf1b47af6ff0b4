"""Pretrained: a model with everything that is needed to use it and to save it again."""

import dataclasses
from typing import TYPE_CHECKING, Any

from dlm_jax.diffusion.spec import BlockSpec, DiffusionSpec
from dlm_jax.models import Transformer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A model, its tokenizer, and what a checkpoint records of it.

    Attributes:
      tokenizer: None where the checkpoint has none.
      hf_config: the config.json that the model was read from.
      source: the directory, workdir@step or hub id that the model was read from.
      recipe: the settings of the run that trained the model, by dotted keys; None where unknown.
      base: the source of the base of a model with unmerged LoRA; None for a model without LoRA.
      merged_adapters: fingerprints of the base and of each adapter merged into it, in order; also the fingerprint of a
        base before quantization. Empty for a model whose parameters are as stored.
    """

    model: Transformer
    tokenizer: "PreTrainedTokenizerBase | None"
    diffusion: DiffusionSpec
    hf_config: dict[str, Any]
    source: str
    recipe: dict[str, Any] | None = None
    base: str | None = None
    merged_adapters: tuple[str, ...] = ()

    @property
    def mask_token_id(self) -> int | None:
        return self.diffusion.mask_token_id

    @property
    def shift(self) -> bool:
        return self.diffusion.shift

    @property
    def blocks(self) -> BlockSpec | None:
        return self.diffusion.blocks

    @property
    def bos_token_id(self) -> int | None:
        """The token that generation starts from."""
        return self._special("bos_token_id")

    @property
    def eos_token_id(self) -> int | None:
        """The token that ends a document."""
        return self._special("eos_token_id")

    @property
    def pad_token_id(self) -> int | None:
        """The padding token; EOS where there is none."""
        pad = self._special("pad_token_id")
        return self.eos_token_id if pad is None else pad

    @property
    def is_autoregressive(self) -> bool:
        """Whether the run that trained the model is on record as autoregressive."""
        return (self.recipe or {}).get("objective.name") == "autoregressive"

    def _special(self, name: str) -> int | None:
        value = getattr(self.tokenizer, name, None)
        value = self.hf_config.get(name) if value is None else value
        return value[0] if isinstance(value, list) else value  # LLaMA 3 lists several EOS tokens
