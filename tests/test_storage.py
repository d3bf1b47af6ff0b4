"""Workdirs and exports on an object store."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
from etils import epath

from dlm_jax.checkpoints.source import locate
from dlm_jax.errors import CheckpointError, ConfigError, DataError
from dlm_jax.storage import (
    atomic_directory,
    ensure_accessible,
    filesystem,
    is_remote,
    local_copy,
    local_file,
    read_json,
    upload,
    write_json,
)
from tests.faults.runs import Runs, ended
from tests.object_store import object_store
from tests.training.conftest import base, corpus  # noqa: F401


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    """`gs://bucket`, for this process and those it starts."""
    pytest.importorskip("gcsfs")
    with object_store(tmp_path_factory.mktemp("store")) as url, pytest.MonkeyPatch.context() as patch:
        for name in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):
            patch.setenv(name, url)
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        assert is_remote("gs://bucket")  # disables the listings cache for the tests' own reads too
        yield "gs://bucket"


def test_upload_and_local_copy(bucket, tmp_path, monkeypatch):
    folder, remote = tmp_path / "model", epath.Path(bucket) / "model"
    (folder / "deep").mkdir(parents=True)
    for name, content in {"config.json": "{}", "weights": "x" * 1000, "zzz": "", "deep/file": "y"}.items():
        (folder / name).write_text(content)
    order, original = [], type(remote).open
    monkeypatch.setattr(type(remote), "open", lambda self, mode="r", **rest: (
        order.append(self.name), original(self, mode, **rest))[1])
    upload(folder, remote, last="config.json")
    assert sorted(order) == ["config.json", "file", "weights", "zzz"] and order[-1] == "config.json"
    copy = local_copy(remote)
    assert {path.name: path.read_text() for path in copy.iterdir()} == {
        "config.json": "{}", "weights": "x" * 1000, "zzz": ""}
    fetched = (copy / "weights").stat().st_ino
    (remote / "zzz").unlink()
    (remote / "config.json").write_text("[]")
    assert local_copy(f"{remote}/") == copy and local_copy(folder) == folder
    assert {path.name: path.read_text() for path in copy.iterdir()} == {"config.json": "[]", "weights": "x" * 1000}
    assert (copy / "weights").stat().st_ino == fetched  # of equal size, so not copied again


def test_local_file(bucket):
    remote = epath.Path(bucket) / "models" / "x.gguf"
    remote.write_text("GGUF and more")
    assert locate(str(remote)).read_text() == "GGUF and more" and locate(remote).name == "x.gguf"
    with pytest.raises(CheckpointError, match="none.gguf"):
        local_file(f"{bucket}/models/none.gguf")


def test_write_json(bucket, tmp_path):
    for path in (epath.Path(bucket) / "a.json", epath.Path(tmp_path) / "a.json"):
        write_json(path, {"one": 1})
        assert read_json(path) == {"one": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_atomic_directory_replaces_only_exports(bucket, tmp_path):
    for parent in (epath.Path(bucket), epath.Path(tmp_path)):
        for number in range(2):
            with atomic_directory(parent / "out") as folder:
                (folder / "README.md").write_text("library_name: dlm_jax")
                (folder / f"file{number}").touch()
                (folder / "config.json").write_text("{}")
        assert (parent / "out" / "config.json").exists() and (parent / "out" / "file1").exists()
        (parent / "other" / "file").parent.mkdir(parents=True, exist_ok=True)
        (parent / "other" / "file").write_text("x")
        with pytest.raises(CheckpointError, match="other"), atomic_directory(parent / "other"):
            pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"]


def test_unreachable_store_is_one_sentence(bucket, monkeypatch):
    assert ensure_accessible(f"{bucket}/anything").name == "anything"

    def refuse(self):
        raise PermissionError("Anonymous caller may not\n list objects")

    monkeypatch.setattr(type(epath.Path(bucket)), "exists", refuse)
    with pytest.raises(ConfigError, match="gs://bucket/run.*Anonymous caller may not list"):
        ensure_accessible(f"{bucket}/run")


@pytest.mark.skipif(importlib.util.find_spec("s3fs") is not None, reason="s3fs is installed")
def test_missing_package_is_named():
    with pytest.raises(ConfigError, match=r"s3://.*dlm-jax\[gcs\]"):
        ensure_accessible("s3://bucket/run")
    with pytest.raises(DataError, match="s3fs"):
        filesystem("s3://bucket/rows")


@pytest.mark.slow
def test_run_reads_rows_from_an_object_store(bucket, base, corpus, tmp_path):  # noqa: F811
    runs = Runs(base, corpus, tmp_path)
    done = subprocess.run([sys.executable, "-m", "dlm_jax.cli.main", "prepare", f"--config={runs.recipe}", "--data",
                           str(corpus), f"--output={bucket}/rows"], capture_output=True, text=True, timeout=300,
                          env=os.environ | {"JAX_PLATFORMS": "cpu"}, check=False)
    assert done.returncode == 0, done.stderr
    losses = []
    for name, settings in (("local", {}), ("bucket", {"data__train": f"{bucket}/rows"})):
        code, _, err = runs.run(tmp_path / name, num_steps=8, **settings)
        assert code == 0, err
        losses.append([json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").open()
                       if "loss" in json.loads(line)])
    assert losses[0] == losses[1] and len(losses[0]) >= 2


@pytest.mark.slow
def test_workdir_and_export_on_an_object_store(bucket, base, corpus, tmp_path):  # noqa: F811
    runs = Runs(base, corpus, tmp_path)
    code, out, err = ended(runs.start(f"{bucket}/run", num_steps=8, log__tensorboard=True), 300)
    assert code == 0, err
    names = {path.name for path in (epath.Path(bucket) / "run").iterdir()}
    assert {"checkpoints", "config.json", "model", "metrics.jsonl", "tensorboard", "summary.json"} <= names
    code, out, err = ended(runs.start(f"{bucket}/run", num_steps=12), 300)
    assert code == 0 and "resumed    from step 8" in out, err
    assert len((epath.Path(bucket) / "run" / "metrics.jsonl").read_text().splitlines()) == 6
    # An uncommitted and a damaged checkpoint are not resumed from.
    (epath.Path(bucket) / "run/checkpoints/12/commit_success.txt").unlink()
    code, out, err = ended(runs.start(f"{bucket}/run", num_steps=12), 300)
    assert code == 0 and "resumed    from step 8" in out, err
    victim = next(path for path in (epath.Path(bucket) / "run/checkpoints/12/params/d").iterdir())
    victim.write_bytes(victim.read_bytes()[:-1] + b"?")
    code, out, err = ended(runs.start(f"{bucket}/run", num_steps=16), 300)
    assert code == 0 and "the checkpoint of step 12 is damaged" in out and "resumed    from step 8" in out, err
    for arguments in (["export", f"--model={bucket}/run", f"--output={bucket}/exported"],
                      ["sample", f"--model={bucket}/exported", "--max_new_tokens=4", "--num_steps=2"]):
        done = subprocess.run([sys.executable, "-m", "dlm_jax.cli.main", *arguments], capture_output=True, text=True,
                              timeout=300, env=os.environ | {"JAX_PLATFORMS": "cpu"}, check=False)
        assert done.returncode == 0 and done.stdout.strip(), done.stderr
