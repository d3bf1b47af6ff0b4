from pathlib import Path

import pytest

from dlm_jax.errors import CheckpointError
from dlm_jax.training import is_workdir, load_workdir
from dlm_jax.training.workdir import split_step


@pytest.mark.parametrize("path, expected", [
    ("runs/a@500", (Path("runs/a"), "500")), ("runs/a@best", (Path("runs/a"), "best")),
    ("runs/a", (Path("runs/a"), None)),
    ("me@home/a", (Path("me@home/a"), None)), ("runs/a@last", (Path("runs/a@last"), None))])
def test_a_step_is_split_off(path, expected):
    assert split_step(path) == expected


def test_a_directory_named_like_a_step_is_a_directory(tmp_path):
    (tmp_path / "a@5").mkdir()
    assert split_step(tmp_path / "a@5") == (tmp_path / "a@5", None)


def test_what_is_no_workdir_is_refused(tmp_path):
    assert not is_workdir(tmp_path) and not is_workdir("gpt2")
    with pytest.raises(CheckpointError, match="is not a workdir"):
        load_workdir(tmp_path)
