"""A short run to load, on the model and corpus of the tests of training."""

import dataclasses

import pytest

from dlm_jax.training.config import CheckpointConfig, LogConfig, TrainConfig, ValidationConfig
from tests.training.conftest import base, config, corpus, pretrained  # noqa: F401


@pytest.fixture(scope="session")
def short_config(config) -> TrainConfig:  # noqa: F811
    """Four steps, every other saved, without validation and micro-batches."""
    return dataclasses.replace(
        config, num_steps=4, checkpoint=CheckpointConfig(every=2, keep=3, keep_best=False),
        validation=ValidationConfig(every=0), log=LogConfig(every=4, tensorboard=False),
        optimizer=dataclasses.replace(config.optimizer, learning_rate=0.03, accumulate_steps=1))
