"""Reads a checkpoint's files as memory-mapped arrays, and writes safetensors one tensor at a time.

A mapped tensor uses no memory until it is copied. The safetensors format (https://huggingface.co/docs/safetensors) is
read here because the numpy reader of its library does not know bfloat16.
"""

import json
import math
import struct
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
from tqdm import tqdm

from dlm_jax.errors import CheckpointError

_DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
_CODES = {np.dtype(dtype): code for code, dtype in _DTYPES.items()}

_SINGLE = ("model.safetensors", "pytorch_model.bin")


def read_tensors(directory: Path, names: Iterable[str] = _SINGLE) -> dict[str, np.ndarray]:
    """Returns every tensor of a checkpoint directory by its stored name, read-only and on disk until it is used.

    Looks for `model.safetensors`, its sharded index, `pytorch_model.bin`, its sharded index, in this order, or for
    files of other `names`.

    Raises:
      CheckpointError: no weights, a shard that is missing, or a file that is damaged.
    """
    for single in names:
        read = _read_safetensors if single.endswith(".safetensors") else _read_torch
        if (directory / single).is_file():
            return read(directory / single)
        index = directory / f"{single}.index.json"
        if index.is_file():
            return _read_shards(index, read)
    looked_for = " or ".join(f"{single}[.index.json]" for single in names)
    raise CheckpointError(f"{directory} holds no weights; it should contain {looked_for}")


def has_model_tensors(directory: Path) -> bool:
    """Returns whether a directory holds the weights of a model, in one file or several."""
    return any((directory / (single + index)).is_file() for single in _SINGLE for index in ("", ".index.json"))


def _read_shards(index: Path, read: Callable[[Path], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    try:
        files = json.loads(index.read_text())["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index} is not a weight index: {error!r}") from error
    tensors: dict[str, np.ndarray] = {}
    for file in sorted(set(files.values())):
        if not (index.parent / file).is_file():
            raise CheckpointError(f"{index} names the file {file}, which is missing beside it")
        tensors |= read(index.parent / file)
    if absent := sorted(set(files) - set(tensors)):
        raise CheckpointError(f"{index} places {absent[0]} in {files[absent[0]]}, which does not contain it")
    return tensors


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    damaged = f"{path} is damaged or not a safetensors file"
    if path.stat().st_size < 8:
        raise CheckpointError(f"{damaged}: it has only {path.stat().st_size} bytes")
    data = np.memmap(path, mode="r").view(np.ndarray)
    start = 8 + struct.unpack("<Q", data[:8].tobytes())[0]
    if start > data.size:
        raise CheckpointError(f"{damaged}: it ends inside the header")
    try:
        header = json.loads(data[8:start].tobytes())
        entries = {name: (entry["dtype"], tuple(entry["shape"]), *entry["data_offsets"])
                   for name, entry in header.items() if name != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{damaged}: its header does not parse") from error
    tensors = {}
    for name, (code, shape, begin, end) in entries.items():
        if code not in _DTYPES:
            raise CheckpointError(f"{path}: tensor {name} has the type {code}, which cannot be read")
        dtype = np.dtype(_DTYPES[code])
        if start + end > data.size or end - begin != math.prod(shape) * dtype.itemsize:
            raise CheckpointError(f"{damaged}: tensor {name} ends past the file or disagrees with its shape")
        tensors[name] = data[start + begin : start + end].view(dtype).reshape(shape)
    return tensors


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError as error:
        raise CheckpointError(f"reading {path} needs PyTorch: `pip install torch`, or convert the checkpoint to "
                              "safetensors") from error
    try:  # weights_only: an arbitrary pickle may run code when loaded
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        return {name: _from_torch(tensor) for name, tensor in tensors.items()}
    except Exception as error:  # of many classes; torch's messages advise loading arbitrary pickles
        raise CheckpointError(f"{path} is damaged, or holds something other than tensors by name") from error


def _from_torch(tensor: "torch.Tensor") -> np.ndarray:  # noqa: F821
    import torch

    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


class LazyTensor(NamedTuple):
    """A tensor to be written: its shape, and what returns its values, which may take every process."""

    shape: tuple[int, ...]
    values: Callable[[], np.ndarray]


def fetch(name: str, tensor: LazyTensor, dtype: np.dtype) -> np.ndarray:
    """Returns a tensor's values in a dtype; raises CheckpointError, which names it, where they are beyond float16."""
    values = tensor.values()
    if dtype == np.float16 and np.abs(values).max() > np.finfo(np.float16).max:
        raise CheckpointError(f"{name} exceeds the range of float16; export as bfloat16 or float32")
    return values.astype(dtype)


def write_tensors(directory: Path, tensors: Mapping[str, LazyTensor], dtype: np.dtype, max_shard_bytes: float) -> None:
    """Writes tensors in this order as one `model.safetensors`, or as shards with an index, fetching one at a time.

    Args:
      dtype: of the stored tensors.
      max_shard_bytes: largest size of a file, unless a single tensor is larger.
    """
    sizes = {name: math.prod(tensor.shape) * dtype.itemsize for name, tensor in tensors.items()}
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    files = ["model.safetensors"] if len(shards) == 1 else [
        f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    with tqdm(desc="exporting", total=len(tensors), leave=False, disable=None, delay=3) as progress:
        for file, names in zip(files, shards, strict=True):
            write_safetensors(directory / file, {name: tensors[name] for name in names}, dtype, progress.update)
    if len(shards) > 1:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def write_safetensors(path: Path, tensors: Mapping[str, LazyTensor], dtype: np.dtype,
                      written: Callable[[], object] = lambda: None) -> None:
    """Writes tensors of a dtype into one file, and calls `written` after each."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + math.prod(tensor.shape) * dtype.itemsize
        header[name] = {"dtype": _CODES[dtype], "shape": tensor.shape, "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # aligns the tensors
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name, tensor in tensors.items():
            file.write(np.ascontiguousarray(fetch(name, tensor, dtype)).view(np.uint8).data)
            written()
