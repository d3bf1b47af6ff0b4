"""The field's harness on local tasks, without a network, and a small model with a real tokenizer."""

import dataclasses
import pathlib
import socket

import pytest

from dlm_jax import DiffusionLM
from dlm_jax.checkpoints import load_pretrained
from tests.sampling.tiny_models import random_model

SHIPPED = pathlib.Path(__file__).parents[2] / "assets" / "stories-gpt2"


@pytest.fixture(scope="session")
def lm() -> DiffusionLM:
    """The shipped tokenizer, and a random GPT-2 that takes 64 tokens."""
    pretrained = load_pretrained(SHIPPED, mask_token=4000)
    config = dataclasses.replace(pretrained.model.config, hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=2,
                                 head_dim=16, mlp_size=48, max_length=64)
    return DiffusionLM(dataclasses.replace(pretrained, model=random_model(config)))


@pytest.fixture
def offline(monkeypatch):
    """No name is looked up, and lm-eval does not collect facts about the machine."""
    import lm_eval.evaluator

    asked = []

    def refuse(*arguments, **settings):
        asked.append(arguments)
        raise OSError("offline")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda results: None)
    yield
    assert not asked


@pytest.fixture(scope="module")
def harness_folder(tmp_path_factory) -> pathlib.Path:
    """Tasks of each kind; see `tests/evaluation/lm_eval_tasks.py`."""
    import datasets

    from tests.evaluation.lm_eval_tasks import write_tasks

    folder = tmp_path_factory.mktemp("harness")
    write_tasks(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        patch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", False)
        yield folder
