"""Everything a training run depends on, as frozen dataclasses; each field carries its meaning for `--print_config`."""

import dataclasses
from typing import Literal

from dlm_jax.checkpoints.hf_names import read_targets
from dlm_jax.data.config import DataConfig
from dlm_jax.diffusion import ObjectiveConfig
from dlm_jax.errors import ConfigError
from dlm_jax.models import LoRAConfig, ModelConfig
from dlm_jax.parallel import MeshConfig
from dlm_jax.training.optimizer import OptimizerConfig


def _field(default: object, meaning: str) -> object:
    return dataclasses.field(default=default, metadata={"help": meaning})


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """Where the network comes from and how it is computed."""

    source: str = _field("", "the base model: a directory, a hub id, or a workdir[@step]")
    init: Literal["pretrained", "random"] = _field("pretrained", "take the source's weights, or only its shape")
    mask_token: int | str | None = _field(None, "an id, an existing token or a new one; None: what the source records")
    param_dtype: Literal["float32", "bfloat16"] = _field("float32", "type of the stored parameters")
    dtype: Literal["float32", "bfloat16"] = _field("float32", "type of activations and matrix products")
    remat: Literal["none", "dots", "full", "offload"] = _field(
        "none", "what the backward pass recomputes to save memory; full keeps only the inputs of layers, offload keeps "
        "those in the host's memory")
    dropout: float | None = _field(None, "share of embeddings, attention and branches that training drops; None: as "
                                         "the base's config.json says")
    attention: str = _field("auto", "attention backend: xla, tpu, cudnn (NVIDIA), or auto: what fits")


    def __post_init__(self) -> None:
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise ConfigError(f"model.dropout must lie in [0, 1), got {self.dropout}")


@dataclasses.dataclass(frozen=True)
class LoRASettings:
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


def lora_of(settings: LoRASettings, architecture: ModelConfig, new_mask_token: bool) -> LoRAConfig | None:
    """What the settings come to for an architecture; None for a run without LoRA.

    Args:
      new_mask_token: the vocabulary has got a row for it, which the base has not learned.

    Raises:
      ConfigError: a target that the architecture does not have, or a value that cannot be.
    """
    if settings.rank == 0:
        return None
    return LoRAConfig(
        rank=settings.rank, alpha=2.0 * settings.rank if settings.alpha is None else settings.alpha,
        dropout=settings.dropout, targets=read_targets(settings.targets, architecture),
        embedding=new_mask_token if settings.embedding is None else settings.embedding, head=settings.head,
        rslora=settings.rslora, dora=settings.dora, frozen_dtype=settings.frozen_dtype)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    every: int = _field(1000, "steps between checkpoints; the last step is always kept")
    keep: int = _field(2, "how many of the latest checkpoints stay")
    keep_best: bool = _field(True, "also keep the one with the best validation loss")


@dataclasses.dataclass(frozen=True)
class ValidationConfig:
    every: int = _field(1000, "steps between validations; 0: never")
    num_rows: int = _field(256, "held-out rows used, the same each time")
    num_samples: int = _field(4, "noise levels drawn for each row, the same each time")
    generation_eval: int = _field(0, "held-out examples answered by sampling at each validation, the same each time; 0: none")
    generation_steps: int = _field(64, "denoising steps for an answer; never more than it has tokens")


@dataclasses.dataclass(frozen=True)
class LogConfig:
    every: int = _field(50, "steps between records; each is the mean over the steps since the last")
    tensorboard: bool = _field(True, "write TensorBoard events beside metrics.jsonl")
    wandb: str | None = _field(None, "Weights & Biases project to log to; None: do not")
    profile: tuple[int, ...] = _field((), "first and last step of a trace, which goes to profile/, e.g. 10,12; none "
                                          "by default")
    sample_every: int = _field(0, "steps between texts sampled into the log; 0: never")
    sample_steps: int = _field(64, "denoising steps for such a text")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A whole run."""

    seed: int = _field(0, "source of all randomness: noise, dropout, order of the data, new weights")
    num_steps: int = _field(10_000, "optimizer steps")
    compilation_cache: str | None = _field(None, "folder in which compiled programs are kept, for restarts and other "
                                                 "runs; may be gs://; None: as JAX is set")
    model: ModelSource = _field(ModelSource(), "the base model")
    lora: LoRASettings = _field(LoRASettings(), "what is trained of the base, if not all of it")
    data: DataConfig = _field(DataConfig(), "the corpus and how it becomes batches")
    objective: ObjectiveConfig = _field(ObjectiveConfig(), "what is minimised")
    optimizer: OptimizerConfig = _field(OptimizerConfig(), "how it is minimised")
    mesh: MeshConfig = _field(MeshConfig(), "how devices share the work; -1 takes what the others leave")
    checkpoint: CheckpointConfig = _field(CheckpointConfig(), "what is saved")
    validation: ValidationConfig = _field(ValidationConfig(), "what is checked on held-out rows")
    log: LogConfig = _field(LogConfig(), "what is reported")

    def __post_init__(self) -> None:
        """Refuses what no single room can see to be impossible."""
        if self.num_steps < 1:
            raise ConfigError(f"num_steps must be at least 1, got {self.num_steps}")
        if self.data.batch_size % self.optimizer.accumulate_steps:
            raise ConfigError(f"data.batch_size {self.data.batch_size} is not a multiple of "
                              f"optimizer.accumulate_steps {self.optimizer.accumulate_steps}")
        if self.checkpoint.every < 1 or self.checkpoint.keep < 1 or self.log.every < 1:
            raise ConfigError("checkpoint.every, checkpoint.keep and log.every must be at least 1")
        if self.log.profile and not (len(self.log.profile) == 2 and 0 < self.log.profile[0] <= self.log.profile[1]):
            raise ConfigError(f"log.profile must be the first and the last step of a trace, e.g. 10,12, got "
                              f"{','.join(map(str, self.log.profile))}")
        if self.validation.generation_eval < 0 or self.validation.generation_steps < 1:
            raise ConfigError("validation.generation_eval must not be negative, and validation.generation_steps at least 1")
        if self.validation.generation_eval and (self.data.examples.format == "none" or not self.validation.every):
            raise ConfigError("validation.generation_eval needs examples with prompts to answer, and validations to do so; set "
                              "data.examples.format and validation.every, or validation.generation_eval to 0")
        if self.log.sample_every and self.objective.name != "diffusion":
            raise ConfigError("log.sample_every samples by diffusion, which the autoregressive objective does not "
                              "learn; set it to 0")


# Changing these makes a run another run: other parameters, other batches, other noise or another optimizer state.
# Everything else may change when a run is resumed, and the change is shown.
_FIXED_ON_RESUME = ("seed", "model.source", "model.init", "model.mask_token", "model.param_dtype", "lora.", "data.",
                    "objective.name", "objective.shift", "optimizer.name")
# That rows which lie elsewhere are the same rows is checked by their content.
_FREE_ON_RESUME = ("data.cache_dir", "data.on_bad_record", "data.train", "data.validation")


def flat_dict(config: object, prefix: str = "") -> dict[str, object]:
    """`{"optimizer.name": "adamw", ...}`: every leaf of nested dataclasses by its dotted key."""
    flat = {}
    for field in dataclasses.fields(config):
        value, key = getattr(config, field.name), prefix + field.name
        flat.update(flat_dict(value, key + ".") if dataclasses.is_dataclass(value) else {key: _plain(value)})
    return flat


def config_changes(saved: dict[str, object], config: TrainConfig) -> list[str]:
    """`key: old -> new` for every difference between a saved flat dict and `config`.

    Raises:
      ConfigError: a difference would make the resumed run another run.
    """
    current = flat_dict(config)
    saved = flat_dict(TrainConfig()) | saved  # a run from before a key came was as that key's default has it
    changed = [key for key in current if saved.get(key) != current[key]]
    lines = {key: f"{key}: {saved.get(key)!r} -> {current[key]!r}" for key in changed}
    refused = [lines[key] for key in changed if key.startswith(_FIXED_ON_RESUME) and key not in _FREE_ON_RESUME]
    if bool(saved.get("optimizer.ema_decay")) != bool(config.optimizer.ema_decay):  # an average cannot begin half-way
        refused.append(lines["optimizer.ema_decay"])
    if refused:
        raise ConfigError(f"this workdir holds a run with another setting ({'; '.join(refused)}), which a resumed run "
                          "may not change; restore the setting or choose a new workdir")
    return list(lines.values())


def _plain(value: object) -> object:
    """As JSON would give it back."""
    return [_plain(item) for item in value] if isinstance(value, (tuple, list)) else value


# Keys of the version before: refused, with the new name.
OLD_KEYS = {
    "data.bad_records": "data.on_bad_record",
    "data.examples.padding": "data.examples.train_on_padding",
    "data.examples.too_long": "data.examples.overlong",
    "data.pack": "data.packing",
    "mesh.slices": "mesh.dcn_data",
    "objective.anneal_shared": "objective.share_annealed_mask",
    "objective.block_stages": "objective.block_size_schedule",
    "objective.clean_blocks": "objective.clean_attention",
    "objective.normaliser": "objective.loss_normalization",
    "objective.stages": "objective.time_curriculum",
    "optimizer.nonfinite": "optimizer.on_nonfinite",
    "validation.answer_steps": "validation.generation_steps",
    "validation.answers": "validation.generation_eval",
}
