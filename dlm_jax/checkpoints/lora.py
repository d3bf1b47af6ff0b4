"""LoRA as a user asks for it, resolved for the architecture that it goes beside."""

import dataclasses
from typing import TYPE_CHECKING, Literal

from dlm_jax.config_fields import field

if TYPE_CHECKING:
    from dlm_jax.models import LoRAConfig, ModelConfig


@dataclasses.dataclass(frozen=True)
class LoRASettings:
    """The config group `lora`."""

    rank: int = field(0, "rank of LoRA's products; 0: no LoRA, all parameters are trained, other keys have no effect")
    alpha: float | None = field(None, "the products are scaled by alpha / rank; None: twice the rank")
    dropout: float = field(0.0, "dropout rate of the inputs of LoRA's products")
    targets: tuple[str, ...] = field(("all",), "projections with a product, as q,v or q_proj,v_proj; all: every one "
                                               "inside the blocks, which excludes the head")
    embedding: bool | None = field(None, "train the full embedding, with a head that is tied to it; None: if the mask "
                                         "token is new, since nothing else learns its row")
    head: bool = field(False, "train the full head, if it is not tied to the embedding")
    rslora: bool = field(False, "scale the products by alpha / sqrt(rank) instead (rank-stabilized LoRA)")
    dora: bool = field(False, "learn the norm of each output's weights apart from their direction (DoRA)")
    frozen_dtype: Literal["bfloat16", "float32", "int8", "nf4"] = field(
        "bfloat16", "stored dtype of matrices that are not trained; int8 and nf4: of those in the blocks")
    where: Literal["all", "noised"] = field("all", "positions at which the products are added; noised: those of the "
                                                   "noised copy, so that clean text is computed as by the base")
    draft_head: bool = field(False, "also train an MLP by which drafts see the token before them")


def resolve_lora(lora: "LoRASettings | LoRAConfig | None", config: "ModelConfig",
                 new_mask_token: bool) -> "LoRAConfig | None":
    """Returns the LoRA of an architecture; None for none, and a LoRAConfig as it is.

    Args:
      new_mask_token: whether the vocabulary has a new row for the mask token, which the base has not learned.

    Raises:
      ConfigError: a target that the architecture does not have, or a value out of range.
    """
    from dlm_jax.checkpoints.hf_names import read_targets  # here, as a recipe is checked before JAX is imported
    from dlm_jax.models import LoRAConfig

    if lora is None or isinstance(lora, LoRAConfig):
        return lora
    if lora.rank == 0:
        return None
    return LoRAConfig(**dataclasses.asdict(lora) | {
        "alpha": 2.0 * lora.rank if lora.alpha is None else lora.alpha,
        "targets": read_targets(lora.targets, config),
        "embedding": new_mask_token if lora.embedding is None else lora.embedding})
