"""What `--mesh` means, and where compiled programs are kept."""

import argparse
import os
import pathlib

import pytest

from dlm_jax.cli.shared import CACHE_VARIABLE, keep_programs, read_mesh
from dlm_jax.errors import ConfigError
from dlm_jax.parallel import MeshConfig


def test_read_mesh():
    assert read_mesh("data=2,tensor=4") == MeshConfig(data=2, fsdp=1, tensor=4)
    assert read_mesh("fsdp=-1") == MeshConfig(fsdp=-1)


@pytest.mark.parametrize("text", ["", "fsdp", "rows=2", "data=two", "data=2,,tensor=2", "data=2.5"])
def test_read_mesh_refuses_with_an_example(text):
    with pytest.raises(ConfigError, match="fsdp=-1"):
        read_mesh(text)


@pytest.fixture
def no_cache(monkeypatch, tmp_path):
    """A user whose programs have never been kept."""
    monkeypatch.delenv(CACHE_VARIABLE)
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield tmp_path / "cache"
    os.environ.pop(CACHE_VARIABLE, None)  # for monkeypatch to put back


def test_programs_are_kept(no_cache, monkeypatch, capsys):
    keep_programs(argparse.Namespace())
    folder = os.environ[CACHE_VARIABLE]
    assert folder.startswith(str(no_cache)) and pathlib.Path(folder).is_dir()
    assert str(no_cache) in capsys.readouterr().err
    monkeypatch.delenv(CACHE_VARIABLE)
    keep_programs(argparse.Namespace())
    assert os.environ[CACHE_VARIABLE] == folder and not capsys.readouterr().err


@pytest.mark.parametrize(("setting", "coordinator"), [("/elsewhere", None), ("", None), (None, "auto")])
def test_programs_are_left_to_the_user(no_cache, monkeypatch, setting, coordinator):
    if setting is not None:
        monkeypatch.setenv(CACHE_VARIABLE, setting)
    keep_programs(argparse.Namespace(coordinator=coordinator))
    assert os.environ.get(CACHE_VARIABLE) == setting and not no_cache.exists()


def test_without_a_place_nothing_is_kept(no_cache):
    no_cache.touch()
    keep_programs(argparse.Namespace())
    assert CACHE_VARIABLE not in os.environ
