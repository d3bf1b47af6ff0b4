"""Checksums find every change of a checkpoint's files, and a run falls back to the checkpoint before."""

import random
import shutil

import numpy as np
import pytest
from etils import epath

from dlm_jax.checkpoints import load_pretrained
from dlm_jax.checkpoints.orbax import CHECKSUMS, latest_valid_step, saved_steps, verify_checksums, write_checksums
from dlm_jax.errors import CheckpointError
from dlm_jax.training import train
from tests.training.conftest import changed


@pytest.fixture(scope="module")
def full_run(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "run"
    train(changed(config, "checkpoint.keep_best", False), workdir)
    return workdir


@pytest.fixture
def copy(full_run, tmp_path):
    shutil.copytree(full_run, tmp_path / "run")
    return tmp_path / "run"


def data_files(step_directory):
    return sorted(path for path in step_directory.rglob("*")
                  if path.is_file() and path.name not in (CHECKSUMS, "_CHECKPOINT_METADATA")
                  and path != step_directory / "commit_success.txt")


def test_every_changed_file_is_found(copy):
    directory, dice = copy / "checkpoints" / "20", random.Random(0)
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
    path = copy / "checkpoints" / "20" / CHECKSUMS
    path.unlink() if content is None else path.write_text(content)
    assert verify_checksums(epath.Path(path.parent)) == f"{CHECKSUMS} is {'missing' if content is None else 'damaged'}"


def test_checksums_of_some_items(copy):
    directory = epath.Path(copy / "checkpoints" / "20")
    for path in data_files(copy / "checkpoints" / "20" / "optimizer"):
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


def test_run_falls_back_to_the_checkpoint_before(copy, full_run, config, capsys):
    run = changed(changed(config, "checkpoint.keep_best", False), "num_steps", 21)
    sound = shutil.copytree(full_run, copy.parent / "sound")
    train(run, sound)
    assert saved_steps(copy) == [15, 20]
    flip(copy / "checkpoints" / "20", "optimizer")
    assert latest_valid_step(copy)[0] == 15
    capsys.readouterr()
    train(run, copy)
    out = capsys.readouterr().out
    assert "damaged    the checkpoint of step 20 is damaged (optimizer/" in out
    assert "resumed    from step 15" in out
    assert (copy / "damaged" / "20-1").is_dir() and saved_steps(copy) == [20, 21]
    assert verify_checksums(epath.Path(copy) / "checkpoints" / "21") is None
    one, other = (load_pretrained(path).model.embed.embedding[...] for path in (sound, copy))
    np.testing.assert_array_equal(one, other)


def test_run_stops_if_all_checkpoints_are_damaged(copy, config):
    for step in (15, 20):
        flip(copy / "checkpoints" / str(step), "params")
    with pytest.raises(CheckpointError, match="step 20 .* step 15"):
        train(changed(config, "num_steps", 21), copy)
    assert saved_steps(copy) == [15, 20]


def test_damaged_checkpoint_is_not_loaded(copy):
    flip(copy / "checkpoints" / "20", "ema")
    with pytest.raises(CheckpointError, match="20 is damaged: ema/"):
        load_pretrained(copy)
    assert load_pretrained(f"{copy}@15").source.endswith("@15")
