"""Files to read records from: found by a path or a glob, on a disk or an object store, plain or compressed."""

import dataclasses
import glob
import io
import os
import zlib
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any, BinaryIO

from dlm_jax.errors import DataError
from dlm_jax.storage import filesystem, is_remote

COMPRESSED = (".gz", ".zst")
BLOCK = 1 << 20  # bytes that are read at a time
_VERSIONS = ("etag", "ETag", "blob_id", "mtime", "last_modified", "LastModified", "created")  # as stores call it


@dataclasses.dataclass(frozen=True)
class File:
    """A file on a disk or an object store.

    Attributes:
      name: its path, as messages show it.
      key: the same for all paths to one file.
      size: bytes as stored; None where a store does not report it.
      version: changes when the content does.
    """

    name: str
    key: str
    size: int | None
    version: int | str

    @property
    def suffix(self) -> str:
        """The suffix without that of a compression, in lower case."""
        return PurePosixPath(self.name.lower().removesuffix(self.compression)).suffix

    @property
    def compression(self) -> str:
        """The suffix of a compression, or an empty string."""
        last = PurePosixPath(self.name).suffix.lower()
        return last if last in COMPRESSED else ""

    def open(self) -> BinaryIO:
        """Opens the bytes as stored."""
        try:
            if not is_remote(self.name):
                return open(self.name, "rb", buffering=BLOCK)
            files, path = filesystem(self.name)
            return io.BufferedReader(_RemoteFile(files.open(path, "rb"), self.name), BLOCK)
        except DataError:
            raise
        except Exception as error:  # each store has errors of its own
            raise DataError(f"{self.name}: cannot be read ({one_line(error)})") from error

    def decompress(self, stored: BinaryIO) -> BinaryIO:
        """Returns a reader of the content of the opened file."""
        if not self.compression:
            return stored
        return io.BufferedReader(_Decompressed(stored, _DECOMPRESSORS[self.compression]), BLOCK)


def find_files(pattern: str) -> list[File]:
    """Returns the files that a path or a glob (`**` included) names, sorted.

    Raises:
      DataError: there are none, a store cannot be reached, or it is a folder.
    """
    files, folders = (_find_remote if is_remote(pattern) else _find_local)(pattern)
    if not files:
        hint = f"; it is a folder, name the files in it, as in {pattern.rstrip('/')}/**/*.jsonl" if folders else ""
        raise DataError(f"no file matches {pattern!r}{hint}")
    return sorted(files, key=lambda file: file.name)


def _find_local(pattern: str) -> tuple[list[File], bool]:
    path = os.path.expanduser(pattern)
    found = [path] if os.path.exists(path) else glob.glob(path, recursive=True)  # a name may look like a glob
    stats = [(name, os.stat(name)) for name in found if os.path.isfile(name)]
    return [File(name, os.path.realpath(name), stat.st_size, stat.st_mtime_ns) for name, stat in stats], bool(found)


def _find_remote(pattern: str) -> tuple[list[File], bool]:
    files, path = filesystem(pattern)
    try:
        found = files.glob(path, detail=True) if glob.has_magic(path) else {path: files.info(path)}
    except FileNotFoundError:
        return [], False
    except Exception as error:  # each store has errors of its own
        raise DataError(f"{pattern} cannot be reached ({one_line(error)})") from error
    protocol = pattern.partition("://")[0]
    named = [(inner if "://" in inner else f"{protocol}://{inner.lstrip('/')}", info)
             for inner, info in found.items() if info["type"] == "file"]
    return [File(name, name, info.get("size"), next((str(info[key]) for key in _VERSIONS if info.get(key)), ""))
            for name, info in named], bool(found)


def one_line(error: Exception) -> str:
    """Returns an error's message, or its class where it has none, on one line."""
    return " ".join(str(error).split()) or type(error).__name__


class _RemoteFile(io.RawIOBase):
    """A file of an object store whose failures are not mistaken for damage to the file."""

    def __init__(self, file: BinaryIO, name: str):
        self._file, self._name = file, name

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer) -> int:
        try:
            data = self._file.read(len(buffer))
        except Exception as error:  # each store has errors of its own
            raise DataError(f"{self._name}: the store stopped answering ({one_line(error)}); run the same command "
                            "again to resume") from error
        buffer[:len(data)] = data
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


class _Decompressed(io.RawIOBase):
    """All frames of a .gz or .zst file, up to where it is truncated.

    (Python's `gzip` loses the last bytes before a truncation, and zstandard's own reader does not notice it.)
    """

    def __init__(self, stored: BinaryIO, make_decompressor: Callable[[], Any]):
        self._stored, self._make_decompressor, self._frame = stored, make_decompressor, None
        self._unused, self._ready = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._ready:
            block = self._unused or self._stored.read(BLOCK // 8)
            if not block:
                if self._frame:
                    raise EOFError("it is truncated")
                return 0
            self._unused = b""
            if not self._frame and not (block := block.lstrip(b"\0")):  # some tools pad with zeros after a frame
                continue
            self._frame = self._frame or self._make_decompressor()
            self._ready = memoryview(self._frame.decompress(block))
            if self._frame.eof:
                self._unused, self._frame = self._frame.unused_data, None
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size


def _zstandard_decompressor() -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise DataError("a .zst file needs zstandard: pip install zstandard") from error
    return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()  # as `zstd --long=31` may need


_DECOMPRESSORS = {".gz": lambda: zlib.decompressobj(wbits=31),  # 16: with a gzip header
                  ".zst": _zstandard_decompressor}
