"""Everything that a training run depends on, as frozen dataclasses; `--print_config` shows each field's help."""

import dataclasses
from typing import Literal

from dlm_jax.checkpoints.drafter import DrafterSettings
from dlm_jax.checkpoints.lora import LoRASettings
from dlm_jax.config_fields import check_at_least, check_choices, check_range, field
from dlm_jax.data.config import DataConfig
from dlm_jax.diffusion.config import OpenObjective
from dlm_jax.errors import ConfigError
from dlm_jax.parallel import MeshConfig


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """Where the network comes from and how it is computed."""

    source: str = field("", "the base model: a directory, a GGUF file, a hub id, or a workdir[@step]")
    init: Literal["pretrained", "random"] = field("pretrained", "use the source's weights, or only its shape")
    mask_token: int | str | None = field(
        None, "an id, an existing token or a new one; None: as the source records, or else default_mask_token")
    default_mask_token: int | str = field("<|mask|>", "the mask token for a source that records none")
    param_dtype: Literal["float32", "bfloat16"] = field("float32", "type of the stored parameters")
    dtype: Literal["auto", "float32", "bfloat16"] = field(
        "float32", "type of activations and matrix products; auto: bfloat16 where this machine is faster in it")
    remat: Literal["none", "dots", "full", "offload"] = field(
        "none", "what the backward pass recomputes to save memory; full keeps only the inputs of layers, offload keeps "
        "those in host memory")
    dropout: float | None = field(
        None, "dropout rate of embeddings, attention and residual branches; None: as in the base's config.json")
    attention: str = field("auto", "attention backend: xla, tpu, cudnn (NVIDIA); auto: the fastest that fits")

    def __post_init__(self) -> None:
        check_choices(self, "model")
        if self.dropout is not None:
            check_range(self.dropout, 0, 1, "model.dropout", open_high=True)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How the loss is minimized."""

    name: Literal["adamw", "lion", "adafactor", "muon"] = field("adamw", "the optimizer")
    learning_rate: float = field(3e-4, "peak learning rate")
    b1: float = field(0.9, "decay of the first moment (Muon: of the momentum, 0.95 is usual)")
    b2: float = field(0.999, "decay of the second moment (Lion: of the momentum)")
    eps: float = field(1e-8, "added to the root of the second moment (AdamW, and Adam beside Muon)")
    weight_decay: float = field(0.0, "decay of matrices, times the learning rate; norms and biases do not decay")
    clip_norm: float = field(1.0, "largest global norm of the gradient; 0: no clipping")
    schedule: Literal["constant", "cosine", "wsd"] = field(
        "cosine", "learning rate after the warm-up; wsd: constant, then linear decay")
    warmup_steps: int = field(0, "steps of linear warm-up from 0")
    decay_steps: int = field(0, "wsd: steps of the final decay, at the end of the run")
    final_fraction: float = field(0.0, "learning rate at the end, as a share of the peak")
    accumulate_steps: int = field(1, "micro-batches per step")
    on_nonfinite: Literal["raise", "skip"] = field(
        "raise", "if the loss or the gradient is not finite: raise an error, or skip the step and count it")
    offload: bool = field(False, "keep the optimizer state in host memory between steps")
    ema_decay: float = field(
        0.0, "decay of the moving average of the parameters, which is then validated and exported; 0: none")

    def __post_init__(self) -> None:
        check_choices(self, "optimizer")
        check_at_least(self.accumulate_steps, 1, "optimizer.accumulate_steps")
        check_range(self.ema_decay, 0, 1, "optimizer.ema_decay", open_high=True)
        for name in ("learning_rate", "weight_decay", "clip_norm", "warmup_steps", "decay_steps"):
            check_at_least(getattr(self, name), 0, f"optimizer.{name}")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Which checkpoints are written and kept."""

    every: int = field(1000, "steps between checkpoints; the last step is always saved")
    keep: int = field(2, "number of latest checkpoints to keep")
    keep_best: bool = field(True, "also keep the one with the best validation loss")

    def __post_init__(self) -> None:
        check_at_least(self.every, 1, "checkpoint.every")
        check_at_least(self.keep, 1, "checkpoint.keep")


@dataclasses.dataclass(frozen=True)
class ValidationConfig:
    """What is measured on held-out rows."""

    every: int = field(1000, "steps between validations; 0: never")
    num_rows: int = field(256, "held-out rows used, the same each time")
    num_samples: int = field(4, "noise levels per row, the same each time")
    num_generations: int = field(
        0, "held-out examples answered by sampling at each validation, the same each time; 0: none")
    generation_steps: int = field(64, "denoising steps of a generated answer; at most the number of its tokens")

    def __post_init__(self) -> None:
        check_at_least(self.num_generations, 0, "validation.num_generations")
        check_at_least(self.generation_steps, 1, "validation.generation_steps")


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """What is reported."""

    every: int = field(50, "steps between records; each is the mean over the steps since the last")
    tensorboard: bool = field(True, "write TensorBoard events next to metrics.jsonl")
    wandb: str | None = field(None, "Weights & Biases project to log to; None: do not")
    profile: tuple[int, ...] = field(
        (), "first and last step of a trace, which is written to profile/, e.g. 10,12; empty: no trace")
    sample_every: int = field(0, "steps between texts sampled into the log; 0: never")
    sample_steps: int = field(64, "denoising steps for such a text")

    def __post_init__(self) -> None:
        check_at_least(self.every, 1, "log.every")
        if self.profile and not (len(self.profile) == 2 and 0 < self.profile[0] <= self.profile[1]):
            raise ConfigError("log.profile must be the first and the last step of a trace, e.g. 10,12, got "
                              f"{','.join(map(str, self.profile))}")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A run."""

    seed: int = field(0, "source of all randomness: noise, dropout, order of the data, new weights")
    num_steps: int = field(10_000, "optimizer steps")
    compilation_cache: str | None = field(
        None, "folder in which compiled programs are kept, for restarts and other runs; may be gs://; None: JAX's own "
        "setting, or for one process the user's cache")
    model: ModelSource = field(ModelSource(), "the base model")
    lora: LoRASettings = field(LoRASettings(), "what is trained of the base, if not all of it")
    drafter: DrafterSettings = field(DrafterSettings(), "objective drafter: what is trained beside the base")
    data: DataConfig = field(DataConfig(), "the corpus and how it becomes batches")
    objective: OpenObjective = field(OpenObjective(), "what is minimized")
    optimizer: OptimizerConfig = field(OptimizerConfig(), "how it is minimized")
    mesh: MeshConfig = field(MeshConfig(), "how devices share the computation; -1: all remaining devices")
    checkpoint: CheckpointConfig = field(CheckpointConfig(), "what is saved")
    validation: ValidationConfig = field(ValidationConfig(), "what is measured on held-out rows")
    log: LogConfig = field(LogConfig(), "what is reported")

    def __post_init__(self) -> None:
        """Checks what involves several groups."""
        check_at_least(self.num_steps, 1, "num_steps")
        if self.data.batch_size % self.optimizer.accumulate_steps:
            raise ConfigError(f"data.batch_size {self.data.batch_size} is not a multiple of "
                              f"optimizer.accumulate_steps {self.optimizer.accumulate_steps}")
        if self.validation.num_generations and (self.data.examples.format == "none" or not self.validation.every):
            raise ConfigError("validation.num_generations needs examples with prompts, and validations; set "
                              "data.examples.format and validation.every, or validation.num_generations to 0")
        if self.objective.name == "drafter":
            self._check_drafter()
        if self.objective.teacher.is_needed and self.model.init != "pretrained":
            raise ConfigError(f"objective.teacher needs a parent that knows something, and model.init is "
                              f"{self.model.init}; set it to pretrained, or the weights of objective.teacher to 0")
        if self.log.sample_every and self.objective.name not in (None, "diffusion"):
            raise ConfigError("log.sample_every needs objective.name diffusion, and this run's is "
                              f"{self.objective.name}; set it to 0")

    def _check_drafter(self) -> None:
        for key, value, needed in (("lora.rank", self.lora.rank, 0), ("model.init", self.model.init, "pretrained"),
                                   ("validation.num_generations", self.validation.num_generations, 0)):
            if value != needed:
                raise ConfigError(f"objective.name drafter needs {key} {needed}, and it is {value}: the base, which "
                                  "the drafter learns from, stays as it is")


# Changing these would make it another run: other parameters, batches, noise or optimizer state.
# Everything else may change when a run is resumed, and the change is shown.
_FIXED_ON_RESUME = ("seed", "model.source", "model.init", "model.mask_token", "model.param_dtype", "lora.", "drafter.",
                    "data.", "objective.name", "objective.shift", "optimizer.name")
# Rows from another place are compared by their content.
_FREE_ON_RESUME = ("data.cache_dir", "data.on_bad_record", "data.train", "data.validation")


def flat_dict(config: object, prefix: str = "") -> dict[str, object]:
    """Returns `{"optimizer.name": "adamw", ...}`: every leaf of nested dataclasses by its dotted key."""
    flat = {}
    for item in dataclasses.fields(config):
        value, key = getattr(config, item.name), prefix + item.name
        flat.update(flat_dict(value, key + ".") if dataclasses.is_dataclass(value) else {key: _as_json(value)})
    return flat


def config_changes(saved: dict[str, object], config: TrainConfig) -> list[str]:
    """Returns `key: old -> new` for every difference between a saved flat dict and `config`.

    Raises:
      ConfigError: a difference would make the resumed run another run.
    """
    current = flat_dict(config)
    saved = flat_dict(TrainConfig()) | saved  # a run from before a key existed has that key's default
    changed = [key for key in current if saved.get(key) != current[key]]
    lines = {key: f"{key}: {saved.get(key)!r} -> {current[key]!r}" for key in changed}
    refused = [lines[key] for key in changed if key.startswith(_FIXED_ON_RESUME) and key not in _FREE_ON_RESUME]
    if bool(saved.get("optimizer.ema_decay")) != bool(config.optimizer.ema_decay):  # an average cannot start half-way
        refused.append(lines["optimizer.ema_decay"])
    if refused:
        raise ConfigError(f"this workdir holds a run with another setting ({'; '.join(refused)}), which a resumed run "
                          "may not change; restore the setting or choose a new workdir")
    return list(lines.values())


def _as_json(value: object) -> object:
    """Returns a value as JSON would restore it."""
    return [_as_json(item) for item in value] if isinstance(value, (tuple, list)) else value


# Keys and values of the version before: refused, with the new name.
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
    "validation.answers": "validation.num_generations",
}
OLD_VALUES = {
    "model.attention": {"dense": "xla", "flash_tpu": "tpu"},
    "data.examples.overlong": {"refuse": "error"},
    "data.examples.train_on_padding": {"trained": "true", "ignored": "false"},
    "data.on_bad_record": {"stop": "raise"},
    "data.packing": {"plain": "concat", "segments": "document_mask"},
    "objective.clean_attention": {"whole": "block_bidirectional"},
    "objective.loss_normalization": {"maskable": "all_tokens", "masked": "masked_tokens", "examples": "per_example"},
    "optimizer.on_nonfinite": {"stop": "raise"},
}
