"""The field's harness on local tasks, without a network."""

import pathlib
import socket

import pytest


@pytest.fixture
def offline(monkeypatch):
    """No name is looked up, and what the harness says of the machine is not waited for."""
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
