"""From a base model and a corpus to a trained model: state, step, loop, optimizer, checkpoints, metrics."""

from dlm_jax.checkpoints.workdir import is_workdir, load_workdir
from dlm_jax.training.config import TrainConfig
from dlm_jax.training.loop import train
from dlm_jax.training.metrics import count_params, read_records, step_seconds

__all__ = ["TrainConfig", "count_params", "is_workdir", "load_workdir", "read_records", "step_seconds", "train"]
