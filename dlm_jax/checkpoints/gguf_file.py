"""Reads GGUF files: their metadata, and their tensors, which are dequantized when they are used.

The format is https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The package `gguf` knows the types of tensors
and dequantizes them; its reader takes seconds for a vocabulary, so the header is read here.
"""

import dataclasses
import functools
import math
import mmap
import re
import struct
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from dlm_jax.errors import CheckpointError

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", _BOOL: "?", 10: "Q", 11: "q", 12: "d"}
_SPLIT = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


def is_gguf(path: Path) -> bool:
    """Returns whether a path is a GGUF file by its name, or a file that begins as one."""
    if path.suffix == ".gguf" and not path.is_dir():
        return True
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == MAGIC


@dataclasses.dataclass(frozen=True, eq=False)
class GGUFTensor:
    """A tensor in a file. `np.asarray` dequantizes it to float32, anew each time.

    Attributes:
      kind: its `gguf.GGMLQuantizationType`.
      shape: of what `np.asarray` returns.
      stored: its bytes, one row per row of the tensor.
      convert: applied to what is dequantized.
    """

    name: str
    kind: Any
    shape: tuple[int, ...]
    stored: np.ndarray
    convert: Callable[[np.ndarray], np.ndarray] = np.asarray
    dtype: np.dtype = np.dtype(np.float32)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        values = self.convert(_gguf().dequantize(self.stored, self.kind))
        return np.array(values, dtype, copy=copy)

    def __len__(self) -> int:
        return self.shape[0]


@dataclasses.dataclass(frozen=True)
class GGUFContent:
    """What a file holds, or several into which a model was split."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]


def read_gguf(path: Path) -> GGUFContent:
    """Reads the header of a file, and of those after it for a model that was split into several.

    Raises:
      CheckpointError: the file or one after it is missing, damaged, or of an unknown version or type.
    """
    content = _read(path)
    parts = content.metadata.get("split.count", 0)
    if parts <= 1:
        return content
    if not (found := _SPLIT.search(path.name)) or int(found[2]) != parts:
        raise CheckpointError(f"{path} is one of {parts} files of a model, and its name does not end with its number, "
                              f"as -00001-of-{parts:05d}.gguf; give it the name that it had")
    paths = [path.with_name(f"{path.name[: found.start()]}-{part:05d}-of-{parts:05d}.gguf")
             for part in range(1, parts + 1)]
    if absent := [part.name for part in paths if not part.is_file()]:
        raise CheckpointError(f"{path} is one of {parts} files of a model, of which {absent[0]} is missing beside it")
    files = [_read(part) for part in paths]
    tensors = {name: tensor for file in files for name, tensor in file.tensors.items()}
    return GGUFContent(paths[0], files[0].metadata, tensors)


def _read(path: Path) -> GGUFContent:
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}")
    status = path.stat()
    return _read_header(path, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=16)
def _read_header(path: Path, mtime_ns: int, size: int) -> GGUFContent:
    """Reads one file; its time and size in the key renew what is kept."""
    with path.open("rb") as file:
        if (start := file.read(4)) != MAGIC:
            raise CheckpointError(f"{path} is not a GGUF file: it begins with {start!r} instead of {MAGIC!r}")
        buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    header = _Header(buffer)
    try:
        version = header.scalar("I")
        if version not in _VERSIONS:
            raise CheckpointError(f"{path} has version {version} of GGUF; versions 2 and 3, little-endian, can be read")
        num_tensors, num_entries = header.scalar("Q"), header.scalar("Q")
        metadata = {}
        for _ in range(num_entries):
            key = header.string()
            metadata[key] = header.value(header.scalar("I"))
        infos = [header.tensor_info() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", 32)
        start = math.ceil(header.offset / alignment) * alignment
    except (struct.error, UnicodeDecodeError, KeyError, IndexError, ValueError, ArithmeticError) as error:
        raise CheckpointError(f"{path} is damaged or incomplete: its header ends or breaks at byte {header.offset} of "
                              f"{size}; fetch it again") from error
    tensors = {name: _map_tensor(path, np.frombuffer(buffer, np.uint8), name, shape, kind, start + offset)
               for name, shape, kind, offset in infos}
    return GGUFContent(path, metadata, tensors)


def _map_tensor(path: Path, data: np.ndarray, name: str, shape: tuple[int, ...], kind: int, begin: int) -> GGUFTensor:
    gguf = _gguf()
    try:
        known = gguf.GGMLQuantizationType(kind)
        block, size = gguf.GGML_QUANT_SIZES[known]
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: the tensor {name} has the type {kind}, which the installed package gguf does "
                              "not know; upgrade it with `pip install -U gguf`") from error
    if not shape or shape[-1] % block:
        raise CheckpointError(f"{path} is damaged: the tensor {name} of shape {shape} cannot consist of blocks of "
                              f"{block} weights ({known.name})")
    rows, width = math.prod(shape[:-1]), shape[-1] // block * size
    if begin + rows * width > data.size:
        raise CheckpointError(f"{path} is incomplete: it has {data.size:,} bytes, and the tensor {name} ends at byte "
                              f"{begin + rows * width:,}; fetch it again")
    return GGUFTensor(name, known, shape, data[begin : begin + rows * width].reshape(*shape[:-1], width))


def check_types(content: GGUFContent) -> None:
    """Raises CheckpointError if the package `gguf` cannot dequantize a tensor."""
    gguf = _gguf()
    for kind in {tensor.kind for tensor in content.tensors.values()}:
        try:
            gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError as error:
            names = sorted(tensor.name for tensor in content.tensors.values() if tensor.kind == kind)
            raise CheckpointError(f"{content.path}: the tensor {names[0]} has the type {kind.name}, which the "
                                  "installed package gguf does not dequantize; use a file of another type, such as "
                                  "Q8_0 or Q4_K_M") from error


def _gguf() -> ModuleType:
    try:
        import gguf
    except ImportError as error:
        raise CheckpointError("reading a GGUF file needs the package gguf: `pip install gguf`") from error
    return gguf


class _Header:
    """Reads the values of a header, one after another; raises what `struct` does where the file ends."""

    def __init__(self, buffer: mmap.mmap):
        self._buffer, self.offset = buffer, len(MAGIC)

    def scalar(self, code: str) -> Any:
        value, = struct.unpack_from(f"<{code}", self._buffer, self.offset)
        self.offset += struct.calcsize(code)
        return value

    def string(self) -> str:
        text = self._take(self.scalar("Q"))
        return text.decode()

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.scalar(_SCALARS[kind])
        kind, number = self.scalar("I"), self.scalar("Q")
        if kind in (_STRING, _ARRAY):
            return [self.value(kind) for _ in range(number)]
        code = _SCALARS[kind]
        return np.frombuffer(self._take(number * struct.calcsize(code)), f"<{code}").tolist()

    def tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        """Returns name, shape, type and offset; the file has the fastest axis first."""
        name = self.string()
        shape = tuple(self.scalar("Q") for _ in range(self.scalar("I")))[::-1]
        return name, shape, self.scalar("I"), self.scalar("Q")

    def _take(self, number: int) -> bytes:
        if self.offset + number > len(self._buffer):
            raise IndexError(number)
        content = self._buffer[self.offset : self.offset + number]
        self.offset += number
        return content
