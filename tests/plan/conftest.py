"""A recipe of a tiny base model, given by its config.json alone."""

import dataclasses
import importlib.util
import json
import pathlib

import pytest

from dlm_jax.data.config import DataConfig
from dlm_jax.diffusion import ObjectiveConfig
from dlm_jax.plan import Base, describe_base
from dlm_jax.training.config import ModelSource, OptimizerConfig, TrainConfig

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")


def with_values(config: TrainConfig, **groups: dict[str, object]) -> TrainConfig:
    """Returns `config` with values of its groups replaced."""
    return dataclasses.replace(config, **{
        group: dataclasses.replace(getattr(config, group), **values) for group, values in groups.items()})


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> pathlib.Path:
    directory = tmp_path_factory.mktemp("tiny")
    (directory / "config.json").write_text(json.dumps({
        "model_type": "gpt2", "vocab_size": 300, "n_positions": 256, "n_embd": 128, "n_layer": 3, "n_head": 4,
        "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}))
    return directory


@pytest.fixture(scope="session")
def config(tiny) -> TrainConfig:
    return TrainConfig(model=ModelSource(source=str(tiny), mask_token="<mask>", dtype="bfloat16"),
                       data=DataConfig(length=128, batch_size=32), num_steps=100, objective=ObjectiveConfig(),
                       optimizer=OptimizerConfig(weight_decay=0.1, accumulate_steps=2))


@pytest.fixture(scope="session")
def base(config) -> Base:
    return describe_base(config)[0]
