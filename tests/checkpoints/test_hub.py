import re

import huggingface_hub
import pytest

from dlm_jax.checkpoints.hub import locate
from dlm_jax.errors import CheckpointError


def test_directory(tmp_path):
    assert locate(tmp_path) == tmp_path == locate(str(tmp_path))


@pytest.mark.parametrize("name", ["/no/such/directory", "./nothing", "a/b/c", "with space"])
def test_missing_path(name):
    with pytest.raises(CheckpointError, match=re.escape(name)):
        locate(name)


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
