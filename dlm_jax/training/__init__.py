"""From a base model and a corpus to a trained model.

`setup` opens a run, `loop` takes its steps (`step`, `optimizer`), `hooks` do everything else (validation, samples,
checkpoints, a profile), `metrics` measures and reports, and `flops` counts what a step computes.
"""

from dlm_jax.training.config import TrainConfig
from dlm_jax.training.flops import count_params, step_seconds
from dlm_jax.training.loop import train
from dlm_jax.training.metrics import read_records

__all__ = ["TrainConfig", "count_params", "read_records", "step_seconds", "train"]
