import json
import math

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from dlm_jax.checkpoints.hf_tensors import LazyTensor, read_tensors, write_tensors
from dlm_jax.errors import CheckpointError

RANDOM = np.random.default_rng(0)
TENSORS = {f"tensor.{i}": RANDOM.normal(size=(3 + i, 5)).astype(np.float32) for i in range(4)}


def write(directory, dtype=np.float32, max_shard_bytes=math.inf):
    tensors = {name: LazyTensor(tensor.shape, tensor.copy) for name, tensor in TENSORS.items()}
    write_tensors(directory, tensors, np.dtype(dtype), max_shard_bytes)


def assert_equal(found, dtype=np.float32):
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == dtype
        np.testing.assert_array_equal(found[name], tensor.astype(dtype))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("max_shard_bytes", [math.inf, 150, 1])
def test_write_and_read(tmp_path, dtype, max_shard_bytes):
    write(tmp_path, dtype, max_shard_bytes)
    assert_equal(read_tensors(tmp_path), dtype)


def test_files_for_the_safetensors_library(tmp_path):
    (tmp_path / "single").mkdir()
    write(tmp_path / "single")
    assert_equal(safetensors.numpy.load_file(tmp_path / "single" / "model.safetensors"))
    write(tmp_path, max_shard_bytes=150)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in TENSORS.values())
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 1 and {file.name for file in files} == set(index["weight_map"].values())
    for file in files:
        assert sum(tensor.nbytes for tensor in safetensors.numpy.load_file(file).values()) <= 150


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("legacy", [False, True])
def test_torch_files(tmp_path, dtype, legacy):
    state = {name: torch.from_numpy(tensor).to(dtype) for name, tensor in TENSORS.items()}
    torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    found = read_tensors(tmp_path)
    for name, tensor in state.items():
        np.testing.assert_array_equal(found[name].astype(np.float32), tensor.float().numpy())


def test_sharded_torch_files(tmp_path):
    weight_map = {name: f"pytorch_model-{i}.bin" for i, name in enumerate(TENSORS)}
    for name, file in weight_map.items():
        torch.save({name: torch.from_numpy(TENSORS[name])}, tmp_path / file)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_equal(read_tensors(tmp_path))


class Harmful:
    def __reduce__(self):
        return open, ("harm.txt", "w")


def test_pickle_with_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Harmful()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pytorch_model.bin"):
        read_tensors(tmp_path)
    assert not (tmp_path / "harm.txt").exists()


def test_missing_files_and_tensors_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        read_tensors(tmp_path)
    write(tmp_path, max_shard_bytes=150)
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["ghost"] = "model-00001-of-00003.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="ghost"):
        read_tensors(tmp_path)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-00003.safetensors"):
        read_tensors(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 40, -1])
def test_truncated_file_is_refused(tmp_path, keep):
    write(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="model.safetensors"):
        read_tensors(tmp_path)


def test_unknown_dtype_is_named(tmp_path):
    safetensors.torch.save_file({"w": torch.zeros(4).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="F8_E4M3"):
        read_tensors(tmp_path)
