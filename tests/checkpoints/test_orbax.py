"""Checksums find every change of a checkpoint's files, and a run falls back to the checkpoint before."""

import dataclasses
import random
import shutil

import numpy as np
import pytest
from etils import epath

from dlm_jax.checkpoints import load_pretrained
from dlm_jax.checkpoints.orbax import CHECKSUMS, saved_steps, verify_checksums, write_checksums
from dlm_jax.errors import CheckpointError
from dlm_jax.training import train
from tests.training.conftest import checkpoint_arrays


@pytest.fixture(scope="module")
def run_config(short_config):
    return dataclasses.replace(short_config, num_steps=5)


@pytest.fixture(scope="module")
def full_run(run_config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "run"
    train(run_config, workdir)
    return workdir


@pytest.fixture
def copy(full_run, tmp_path):
    """Returns a copy of the run as it was after four of its five steps."""
    shutil.copytree(full_run, tmp_path / "run", ignore=shutil.ignore_patterns("5"))
    return tmp_path / "run"


def data_files(step_directory):
    return sorted(path for path in step_directory.rglob("*")
                  if path.is_file() and path.name not in (CHECKSUMS, "_CHECKPOINT_METADATA")
                  and path != step_directory / "commit_success.txt")


def test_every_changed_file_is_found(copy):
    directory, dice = copy / "checkpoints" / "4", random.Random(0)
    assert verify_checksums(epath.Path(directory)) is None
    files = data_files(directory)
    assert len(files) > 20
    for path in files:
        content = path.read_bytes()
        if content:
            flipped = bytearray(content)
            flipped[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
            path.write_bytes(flipped)
            assert verify_checksums(epath.Path(directory)) == f"{path.relative_to(directory)} is not what was written"
            path.write_bytes(content[: dice.randrange(len(content))])
            assert "is not what was written" in verify_checksums(epath.Path(directory))
        path.unlink()
        assert verify_checksums(epath.Path(directory)) == f"{path.relative_to(directory)} is missing"
        path.write_bytes(content)
    assert verify_checksums(epath.Path(directory)) is None


@pytest.mark.parametrize("content", ["", "{", "[]", '{"params/d": 3}', None])
def test_damaged_checksums_are_found(copy, content):
    path = copy / "checkpoints" / "4" / CHECKSUMS
    path.unlink() if content is None else path.write_text(content)
    assert verify_checksums(epath.Path(path.parent)) == f"{CHECKSUMS} is {'missing' if content is None else 'damaged'}"


def test_checksums_of_some_items(copy):
    directory = epath.Path(copy / "checkpoints" / "4")
    for path in data_files(copy / "checkpoints" / "4" / "optimizer"):
        path.write_bytes(b"")
    assert verify_checksums(directory, ["params", "ema"]) is None and verify_checksums(directory, ["optimizer"])
    write_checksums(directory)
    assert verify_checksums(directory) is None


def flip(step_directory, item):
    """Flips one bit of the largest file of an item."""
    path = max(data_files(step_directory / item), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_run_falls_back_to_the_checkpoint_before(copy, full_run, run_config, capsys):
    flip(copy / "checkpoints" / "4", "optimizer")
    train(run_config, copy)
    out = capsys.readouterr().out
    assert "damaged    the checkpoint of step 4 is damaged (optimizer/" in out
    assert "resumed    from step 2" in out
    assert (copy / "damaged" / "4-1").is_dir() and saved_steps(copy) == [2, 4, 5]
    assert verify_checksums(epath.Path(copy) / "checkpoints" / "4") is None
    expected, found = (checkpoint_arrays(path, 5) for path in (full_run, copy))
    assert [name for name in expected if not np.array_equal(expected[name], found[name])] == []


def test_run_stops_if_all_checkpoints_are_damaged(copy, run_config):
    for step in (2, 4):
        flip(copy / "checkpoints" / str(step), "params")
    with pytest.raises(CheckpointError, match="step 4 .* step 2"):
        train(run_config, copy)
    assert saved_steps(copy) == [2, 4]


def test_damaged_checkpoint_is_not_loaded(copy):
    flip(copy / "checkpoints" / "4", "ema")
    with pytest.raises(CheckpointError, match="4 is damaged: ema/"):
        load_pretrained(copy)
    assert load_pretrained(f"{copy}@2").source.endswith("@2")
