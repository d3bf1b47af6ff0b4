"""Files, on a disk or an object store, plain or compressed: finding them, opening them, knowing where one stands."""

import dataclasses
import glob
import io
import os
import zlib
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any, BinaryIO

from dlm_jax.data.sources.reading import Reader, one_line
from dlm_jax.errors import DataError
from dlm_jax.storage import filesystem, is_remote

COMPRESSED = (".gz", ".zst")
_BLOCK = 1 << 20
_VERSIONS = ("etag", "ETag", "blob_id", "mtime", "last_modified", "LastModified", "created")  # as stores call it


@dataclasses.dataclass(frozen=True)
class File:
    """Attributes:
    name: its path, as messages show it.
    key: the same for two paths to one file.
    size: bytes as stored; None where a store does not say.
    version: changes when the content does.
    """

    name: str
    key: str
    size: int | None
    version: int | str

    @property
    def kind(self) -> str:
        """Its suffix, without that of a compression."""
        return self._suffixes[0]

    @property
    def compression(self) -> str:
        return self._suffixes[1]

    @property
    def _suffixes(self) -> tuple[str, str]:
        path = PurePosixPath(self.name)
        last = path.suffix.lower()
        return (PurePosixPath(path.stem).suffix.lower(), last) if last in COMPRESSED else (last, "")

    def open(self) -> BinaryIO:
        """Its bytes as stored."""
        try:
            if not is_remote(self.name):
                return open(self.name, "rb", buffering=_BLOCK)
            files, path = filesystem(self.name)
            return io.BufferedReader(_Remote(files.open(path, "rb"), self.name), _BLOCK)
        except DataError:
            raise
        except Exception as error:  # each store has errors of its own
            raise DataError(f"{self.name}: cannot be read ({one_line(error)})") from error

    def decompress(self, raw: BinaryIO) -> BinaryIO:
        """What the bytes as stored stand for."""
        if not self.compression:
            return raw
        return io.BufferedReader(_Decompressed(raw, _FRAMES[self.compression]), _BLOCK)


class FileSource(Reader):
    """A source that is one file."""

    def __init__(self, file: File):
        self.file, self.name, self.size = file, file.name, file.size

    def identity(self) -> list:
        return [self.file.key, self.file.size, self.file.version]


def find_files(pattern: str) -> list[File]:
    """The files that a path or a glob (`**` included) names, sorted.

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
    names = [name for name in found if os.path.isfile(name)]
    facts = [(name, os.stat(name)) for name in names]
    return [File(name, os.path.realpath(name), stat.st_size, stat.st_mtime_ns) for name, stat in facts], bool(found)


def _find_remote(pattern: str) -> tuple[list[File], bool]:
    files, path = filesystem(pattern)
    try:
        found = files.glob(path, detail=True) if glob.has_magic(path) else {path: files.info(path)}
    except FileNotFoundError:
        return [], False
    except Exception as error:  # each store has errors of its own
        raise DataError(f"{pattern} cannot be reached ({one_line(error)})") from error
    protocol = pattern.partition("://")[0]
    named = [(inner if "://" in inner else f"{protocol}://{inner.lstrip('/')}", facts)
             for inner, facts in found.items() if facts["type"] == "file"]
    return [File(name, name, facts.get("size"), _version(facts)) for name, facts in named], bool(found)


def _version(facts: dict) -> str:
    return next((str(facts[key]) for key in _VERSIONS if facts.get(key)), "")


class _Remote(io.RawIOBase):
    """A file of an object store, whose failures are not taken for damage to the file."""

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
                            "again, and it goes on") from error
        buffer[:len(data)] = data
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


class _Decompressed(io.RawIOBase):
    """The frames of a .gz or .zst file, all of them, up to where it is cut off. (Python's `gzip` drops what comes
    shortly before that, and zstandard's own reader takes the file for a whole one.)"""

    def __init__(self, raw: BinaryIO, decompressor: Callable[[], Any]):
        self._raw, self._decompressor, self._frame = raw, decompressor, None
        self._stored, self._ready = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._ready:
            stored = self._stored or self._raw.read(_BLOCK // 8)
            if not stored:
                if self._frame:
                    raise EOFError("it is cut off")
                return 0
            self._decompress(stored if self._frame else stored.lstrip(b"\0"))  # some tapes and tools pad with zeros
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size

    def _decompress(self, stored: bytes) -> None:
        self._stored = b""
        if not stored:
            return
        self._frame = self._frame or self._decompressor()
        self._ready = memoryview(self._frame.decompress(stored))
        if self._frame.eof:
            self._stored, self._frame = self._frame.unused_data, None


def _gzip_frame() -> Any:
    return zlib.decompressobj(wbits=31)  # 16: with a gzip header


def _zstandard_frame() -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise DataError("a .zst file needs zstandard: pip install zstandard") from error
    return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()  # what `zstd --long=31` may ask for


_FRAMES = {".gz": _gzip_frame, ".zst": _zstandard_frame}
