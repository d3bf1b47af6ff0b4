"""From a base model and a corpus to a trained model: state, step, loop, optimizer, checkpoints, metrics."""

from dlm_jax.training.config import TrainConfig
from dlm_jax.training.flops import count_params, step_seconds
from dlm_jax.training.loop import train
from dlm_jax.training.metrics import read_records
from dlm_jax.training.workdir import is_workdir, load_workdir

__all__ = ["TrainConfig", "count_params", "is_workdir", "load_workdir", "read_records", "step_seconds", "train"]
