"""Workdirs and exports on an object store."""

import json
import os
import subprocess
import sys

import pytest
from etils import epath

from dlm_jax.errors import ConfigError
from dlm_jax.storage import ensure_accessible, is_remote, local_copy, upload, write_json
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
        assert is_remote("gs://bucket")  # from here on no listing of it is kept, by the tests' own reading either
        yield "gs://bucket"


def test_a_folder_goes_up_with_its_mark_last_and_comes_back(bucket, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    (folder / "deep").mkdir(parents=True)
    for name, content in {"config.json": "{}", "weights": "x" * 1000, "zzz": "", "deep/file": "y"}.items():
        (folder / name).write_text(content)
    order, original = [], type(epath.Path(bucket)).open
    monkeypatch.setattr(type(epath.Path(bucket)), "open",
                        lambda self, mode="r", **rest: (order.append(self.name), original(self, mode, **rest))[1])
    upload(folder, epath.Path(bucket) / "model", last="config.json")
    assert sorted(order) == ["config.json", "file", "weights", "zzz"] and order[-1] == "config.json"
    copy = local_copy(f"{bucket}/model")
    assert {path.name: path.read_text() for path in copy.iterdir()} == {
        "config.json": "{}", "weights": "x" * 1000, "zzz": ""}
    order.clear()
    (epath.Path(bucket) / "model" / "zzz").unlink()
    (epath.Path(bucket) / "model" / "config.json").write_text("[]")
    copy = local_copy(f"{bucket}/model/")
    assert {path.name: path.read_text() for path in copy.iterdir()} == {"config.json": "[]", "weights": "x" * 1000}
    assert order == ["config.json"] * 2  # written, and fetched; the weights are here already
    assert local_copy(folder) == folder


def test_json_is_written_whole(bucket, tmp_path):
    for path in (epath.Path(bucket) / "a.json", epath.Path(tmp_path) / "a.json"):
        write_json(path, {"one": 1})
        assert json.loads(path.read_text()) == {"one": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_what_cannot_be_reached_is_said_in_a_sentence(bucket, monkeypatch):
    assert ensure_accessible(f"{bucket}/anything").name == "anything"

    def refuse(self):
        raise PermissionError("Anonymous caller may not\n list objects")

    monkeypatch.setattr(type(epath.Path(bucket)), "exists", refuse)
    with pytest.raises(ConfigError, match="^gs://bucket/run cannot be reached: .*Anonymous caller may not list"):
        ensure_accessible(f"{bucket}/run")


def test_a_missing_package_is_named(tmp_path):
    """In a process that has no gcsfs."""
    program = ("import sys; sys.modules['gcsfs'] = None\n"
               "from dlm_jax.cli.main import main\n"
               "sys.exit(main(['train', '--config=quickstart', '--workdir=gs://bucket/run']))")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120,
                          env=os.environ | {"JAX_PLATFORMS": "cpu"}, check=False)
    assert done.returncode == 1
    assert done.stderr == ("dlm train: gs://bucket/run cannot be reached without a package for gs://: pip install "
                           "'dlm-jax[gcs]' for gs://\n")


@pytest.mark.slow
def test_a_run_reads_prepared_rows_from_an_object_store(bucket, base, corpus, tmp_path):  # noqa: F811
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
def test_a_run_lives_on_an_object_store(bucket, base, corpus, tmp_path):  # noqa: F811
    runs = Runs(base, corpus, tmp_path)
    code, out, err = ended(runs.start(f"{bucket}/run", num_steps=8, log__tensorboard=True), 300)
    assert code == 0, err
    names = {path.name for path in (epath.Path(bucket) / "run").iterdir()}
    assert {"checkpoints", "config.json", "model", "metrics.jsonl", "tensorboard", "summary.json"} <= names
    code, out, err = ended(runs.start(f"{bucket}/run", num_steps=12), 300)
    assert code == 0 and "resumed    from step 8" in out, err
    assert len((epath.Path(bucket) / "run" / "metrics.jsonl").read_text().splitlines()) == 6
    # A commit without its mark is none; what is damaged is not gone on from.
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
