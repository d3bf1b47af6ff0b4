import re
from pathlib import Path

import huggingface_hub
import pytest

from dlm_jax.checkpoints import load_pretrained
from dlm_jax.checkpoints.source import check_source, is_workdir, locate, split_step
from dlm_jax.errors import CheckpointError


def test_directory(tmp_path):
    assert locate(tmp_path) == tmp_path == locate(str(tmp_path))


@pytest.mark.parametrize("name", ["/no/such/directory", "./nothing", "a/b/c", "with space"])
def test_missing_path(name):
    with pytest.raises(CheckpointError, match=re.escape(name)):
        locate(name)


def test_shipped_model(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("stories", "stories-gpt2"):
        assert (locate(name) / "model.safetensors").is_file()
        check_source(name)
    (tmp_path / "stories-gpt2").mkdir()  # what the user has comes first
    assert locate("stories-gpt2") == Path("stories-gpt2")


def test_file_instead_of_directory(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match="config.json"):
        locate(tmp_path / "model.safetensors")


def test_hub_id_without_network(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="nobody/nothing"):
        locate("nobody/nothing")


def test_weights_are_fetched_on_request(monkeypatch, tmp_path):
    patterns = []

    def snapshot_download(name, allow_patterns, ignore_patterns):
        patterns.append([pattern for pattern in allow_patterns if "safetensors" in pattern or "bin" in pattern])
        return tmp_path

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    locate("gpt2", weights=False)
    locate("gpt2")
    (tmp_path / "model.safetensors").touch()
    locate("gpt2")
    assert patterns == [[], ["*.safetensors"], ["*.bin"], ["*.safetensors"]]


def test_gguf_file_of_a_repository(monkeypatch, tmp_path):
    asked = []

    def snapshot_download(name, allow_patterns, ignore_patterns):
        asked.append((name, allow_patterns))
        return tmp_path

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "q4").mkdir()
    for name, pattern in (("small-Q8_0.gguf", "small-Q8_0.gguf"),
                          ("q4/big-00001-of-00003.gguf", "q4/big-*-of-00003.gguf")):
        (tmp_path / name).touch()
        assert locate(f"org/models-GGUF/{name}") == tmp_path / name
        assert asked.pop() == ("org/models-GGUF", [pattern])
    with pytest.raises(CheckpointError, match="other.gguf"):
        locate("org/models-GGUF/other.gguf")
    with pytest.raises(CheckpointError, match="q4/other.gguf"):
        locate("q4/other.gguf")
    assert len(asked) == 1


@pytest.mark.parametrize("path, expected", [
    ("runs/a@500", (Path("runs/a"), "500")), ("runs/a@best", (Path("runs/a"), "best")),
    ("runs/a", (Path("runs/a"), None)),
    ("me@home/a", (Path("me@home/a"), None)), ("runs/a@last", (Path("runs/a@last"), None))])
def test_split_step(path, expected):
    assert split_step(path) == expected


def test_split_step_of_a_directory_with_at_sign(tmp_path):
    (tmp_path / "a@5").mkdir()
    assert split_step(tmp_path / "a@5") == (tmp_path / "a@5", None)


def test_other_directories_are_no_workdirs(tmp_path):
    assert not is_workdir(tmp_path) and not is_workdir("gpt2")
    with pytest.raises(CheckpointError, match="config.json"):
        load_pretrained(tmp_path)


def test_check_source(tmp_path):
    """Refuses what cannot be loaded, by the names of files alone."""
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.json").touch()
    with pytest.raises(CheckpointError, match="not saved"):
        check_source(str(run))
    (run / "checkpoints" / "500").mkdir()
    for source in (run, f"{run}@500", f"{run}@best"):
        check_source(str(source))
    with pytest.raises(CheckpointError, match="500"):
        check_source(f"{run}@400")
    with pytest.raises(CheckpointError, match=re.escape(str(run))):
        check_source(str(tmp_path / "rum"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        check_source(str(tmp_path / "empty"))
