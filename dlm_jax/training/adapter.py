"""The adapter of a run with LoRA: what the config asks for, and what a workdir keeps to find its base again."""

import dataclasses
import json
from typing import Literal

from etils import epath
from flax import nnx

from dlm_jax.errors import CheckpointError
from dlm_jax.hf.keys import read_targets
from dlm_jax.models import LoraConfig, ModelConfig, combined, fingerprint
from dlm_jax.storage import write_json

_FILE = "adapter.json"


def _field(default: object, meaning: str) -> object:
    return dataclasses.field(default=default, metadata={"help": meaning})


@dataclasses.dataclass(frozen=True)
class LoraSettings:
    rank: int = _field(0, "of LoRA's products; 0: no LoRA, all parameters are trained, and the other keys mean nothing")
    alpha: float | None = _field(None, "the products count alpha / rank; None: twice the rank")
    dropout: float = _field(0.0, "share of the inputs of LoRA's products that training drops")
    targets: tuple[str, ...] = _field(("all",), "projections with a product, as q,v or q_proj,v_proj; all: every one "
                                                "inside the blocks, which is not the head")
    embedding: bool | None = _field(None, "train the whole embedding, with a head that is tied to it; None: where the "
                                          "mask token is new, as nothing else learns its row")
    head: bool = _field(False, "train the whole head, where it is not the embedding")
    rslora: bool = _field(False, "the products count alpha / sqrt(rank) instead (rank-stabilised)")
    dora: bool = _field(False, "learn the norm of each output's weights apart from their direction (DoRA)")
    frozen_dtype: Literal["bfloat16", "float32", "int8", "nf4"] = _field(
        "bfloat16", "stored type of matrices that are not trained; int8 and nf4: of those in the blocks")


def lora_of(settings: LoraSettings, architecture: ModelConfig, new_mask_token: bool) -> LoraConfig | None:
    """What the settings come to for an architecture; None for a run without LoRA.

    Args:
      new_mask_token: the vocabulary has got a row for it, which the base has not learned.

    Raises:
      ConfigError: a target that the architecture does not have, or a value that cannot be.
    """
    if settings.rank == 0:
        return None
    return LoraConfig(
        rank=settings.rank, alpha=2.0 * settings.rank if settings.alpha is None else settings.alpha,
        dropout=settings.dropout, targets=read_targets(settings.targets, architecture),
        embedding=new_mask_token if settings.embedding is None else settings.embedding, head=settings.head,
        rslora=settings.rslora, dora=settings.dora, frozen_dtype=settings.frozen_dtype)


@dataclasses.dataclass(frozen=True)
class Adapter:
    """What a workdir keeps of a run with LoRA beside its checkpoints, which hold only what is trained.

    Attributes:
      base: where the base is: a directory, a hub id, or a workdir@step.
      mask_token: as it was given when the base was loaded.
      fingerprint: of the base, see `base_fingerprint`.
    """

    lora: LoraConfig
    base: str
    mask_token: int | str | None
    fingerprint: str

    def check(self, frozen: nnx.State, merged: tuple[str, ...], workdir: epath.PathLike) -> None:
        """Raises CheckpointError where the base, as `base_fingerprint` takes it, is not what the run began with."""
        if base_fingerprint(frozen, merged) != self.fingerprint:
            raise CheckpointError(f"the base at {self.base} is not the one that the adapter in {workdir} was trained "
                                  f"beside: its weights are others; restore them, or name the right base in "
                                  f"{epath.Path(workdir) / _FILE}")


def base_fingerprint(frozen: nnx.State, merged: tuple[str, ...]) -> str:
    """Of what is not trained; where adapters were merged into that, or it was quantised, of what it was made from, as
    that rounds.

    Args:
      merged: see `Pretrained`.
    """
    return combined(*merged) if merged else fingerprint(frozen)


def write_adapter(workdir: epath.Path, adapter: Adapter | None) -> None:
    """Writes what `read_adapter` reads; None removes what another run may have left."""
    if adapter is None:
        (workdir / _FILE).unlink(missing_ok=True)
    else:
        write_json(workdir / _FILE, dataclasses.asdict(adapter))


def read_adapter(workdir: epath.Path) -> Adapter | None:
    """What `write_adapter` wrote; None for a run without LoRA."""
    path = workdir / _FILE
    try:
        content = json.loads(path.read_text())
        lora = content.pop("lora")
        return Adapter(LoraConfig(**lora | {"targets": tuple(lora["targets"])}), **content)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be read: {error!r}; restore it from a copy") from error
