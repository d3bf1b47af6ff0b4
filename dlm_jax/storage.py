"""Local folders and object stores (`gs://`) alike.

A disk can rename, so what is written there is written beside and renamed. An object store cannot: a folder there is
complete when the one file that marks it so, written last, is there.
"""

import contextlib
import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from etils import epath

from dlm_jax.errors import CheckpointError, ConfigError, DataError


def is_remote(path: epath.PathLike) -> bool:
    """Whether it is on an object store."""
    remote = "://" in os.fspath(path)
    if remote:
        _keep_no_listings()
    return remote


@functools.cache
def _keep_no_listings() -> None:
    """Other processes and libraries write to a bucket too, so a listing of it grows old at once."""
    import fsspec  # with all its compressors, which who reads local files need not wait for

    for protocol in ("gs", "gcs"):
        fsspec.config.conf.setdefault(protocol, {}).setdefault("use_listings_cache", False)


def ensure_accessible(path: epath.PathLike) -> epath.Path:
    """The path, when it is known that its store can be reached.

    Raises:
      ConfigError: what reads this kind of path is not installed, or the store cannot be reached.
    """
    if not is_remote(path):
        return epath.Path(path)
    scheme = os.fspath(path).partition("://")[0]
    try:
        epath.Path(path).exists()
    except ImportError as error:
        raise ConfigError(f"{path} cannot be reached without a package for {scheme}://: pip install 'dlm-jax[gcs]' "
                          "for gs://") from error
    except Exception as error:  # each store has errors of its own: of credentials, of the network, of a missing bucket
        reason = " ".join(" ".join(map(str, error.args)).split())[:300]
        raise ConfigError(f"{path} cannot be reached: {reason or error!r}") from error
    return epath.Path(path)


def cache_folder() -> Path:
    """This machine's folder for what can be made or fetched again."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dlm_jax"


def write_json(path: epath.Path, content: object) -> None:
    """Whole or not at all."""
    text = json.dumps(content, indent=2) + "\n"
    if is_remote(path):  # an object appears when all of it is there
        path.write_text(text)
        return
    beside = path.with_name(path.name + ".new")
    beside.write_text(text)
    os.replace(beside, path)


def upload(folder: Path, to: epath.Path, *, last: str | None = None) -> None:
    """Copies all files below a local folder; the one named `last` comes last and marks the copy as complete."""
    files = sorted(path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file())
    for name in sorted(files, key=lambda name: name == last):
        target = to / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(folder / name, "rb") as source, target.open("wb") as copy:
            shutil.copyfileobj(source, copy, 1 << 24)


def files_below(folder: epath.Path, above: str = "") -> list[str]:
    """Names below a folder, as a/b, sorted."""
    names = []
    for path in folder.iterdir():
        name = above + path.name
        names += files_below(path, name + "/") if path.is_dir() else [name]
    return sorted(names)


def move(folder: epath.Path, to: epath.Path) -> None:
    """Renames a folder; on an object store by copying, so that an interruption leaves both."""
    to.parent.mkdir(parents=True, exist_ok=True)
    if not is_remote(folder):
        folder.rename(to)
        return
    for name in files_below(folder):
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).copy(to / name, overwrite=True)
    folder.rmtree()


def local_copy(directory: epath.PathLike) -> Path:
    """A local folder with the files (not the folders) of a remote one; a local one as it is.

    It is kept in the user's cache, and what has the size it has there is not fetched again.
    """
    if not is_remote(directory):
        return Path(directory)
    name = hashlib.sha256(os.fspath(directory).rstrip("/").encode()).hexdigest()[:16]
    folder = cache_folder() / "copies" / name
    folder.mkdir(parents=True, exist_ok=True)
    files = [path for path in ensure_accessible(directory).iterdir() if path.is_file()]
    for path in folder.iterdir():
        if path.name not in {file.name for file in files}:
            path.unlink()
    for path in files:
        copy = folder / path.name
        if not copy.exists() or copy.stat().st_size != path.stat().length or path.suffix == ".json":
            beside = folder / f".{path.name}.{os.getpid()}"
            with path.open("rb") as source, beside.open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 24)
            os.replace(beside, copy)
    return folder


# ---- Directories that appear whole, and what goes into them.


METADATA_FILE = "dlm_jax.json"  # what an export says for this library alone


@contextlib.contextmanager
def atomic_directory(directory: epath.PathLike, last: str = "config.json") -> Iterator[Path]:
    """Gives a folder to write into, which becomes `directory` once everything is in it.

    Args:
      last: the file without which it is no export; on an object store it is written last.

    Raises:
      CheckpointError: the directory holds something other than an earlier export.
    """
    directory = ensure_accessible(directory) if is_remote(directory) else Path(directory).expanduser()
    if directory.exists() and not _replaceable(directory):
        raise CheckpointError(f"{directory} holds something other than an earlier export; choose a new directory")
    if is_remote(directory):
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
            (directory / last).unlink(missing_ok=True)  # what an earlier export left is no model from here on
            upload(Path(folder), directory, last=last)
        return
    folder, replaced = (directory.parent / f".{directory.name}.{what}-{os.getpid()}" for what in ("new", "old"))
    folder.mkdir(parents=True)
    try:
        yield folder
        if directory.exists():
            directory.rename(replaced)
        folder.rename(directory)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def _replaceable(directory: epath.Path) -> bool:
    if not directory.is_dir():
        return False
    card = directory / "README.md"
    return not any(directory.iterdir()) or (card.is_file() and "library_name: dlm_jax" in card.read_text())


def read_metadata(directory: Path) -> dict[str, Any]:
    """The notes of an export, empty where it has none."""
    return read_json(directory / METADATA_FILE) if (directory / METADATA_FILE).is_file() else {}


def read_json(path: Path) -> dict[str, Any]:
    """Raises CheckpointError where the file is not a JSON object."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return content


# ---- Small files on local disks and object stores (`gs://`, `s3://`, whatever fsspec knows) alike.


_AT_A_TIME = 8  # files that are copied beside each other


def filesystem(path: str):
    """(fsspec filesystem, path in it) of a local or remote path.

    Raises:
      DataError: what reads this kind of path is not installed.
    """
    import fsspec

    try:
        return fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as error:
        extra = " (pip install 'dlm-jax[gcs]')" if path.startswith(("gs://", "gcs://")) else ""
        raise DataError(f"{path} cannot be reached: {error}{extra}") from error


def make_directory(path: str) -> None:
    if not is_remote(path):
        try:
            Path(path).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"{path} cannot be made: {error}") from error


def read_file(path: str) -> bytes | None:
    """The content of a file, or None where there is none."""
    if not is_remote(path):
        return Path(path).read_bytes() if Path(path).is_file() else None
    files, inner = filesystem(path)
    return files.cat_file(inner) if files.exists(inner) else None


def write_file(path: str, content: bytes) -> None:
    """Whole or not at all: beside and renamed on a disk; an object store shows no half-written object."""
    if is_remote(path):
        files, inner = filesystem(path)
        files.pipe_file(inner, content)
        return
    beside = Path(path + ".new")
    beside.write_bytes(content)
    os.replace(beside, path)


def fetch_files(directory: str, sizes: Mapping[str, int], folder: Path) -> None:
    """Copies the files that a local folder lacks, `sizes` in bytes by name; several at a time, each whole or not.

    Raises:
      DataError: there is no room, or a file cannot be read or written.
    """
    from tqdm import tqdm

    files, inner = filesystem(directory)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        missing = {name: size for name, size in sizes.items()
                   if not (folder / name).is_file() or (folder / name).stat().st_size != size}
        needed, free = sum(missing.values()), shutil.disk_usage(folder).free
        if needed > free:
            raise DataError(f"{directory} has {needed / 2**30:.1f} GiB to copy, and {folder} has room for "
                            f"{free / 2**30:.1f}; name a larger place with data.cache_dir, or mount the bucket and "
                            "give the rows' local path")

        def fetch(name: str) -> int:
            beside = folder / f".{name}.{os.getpid()}"
            try:
                files.get_file(f"{inner}/{name}", str(beside))
                os.replace(beside, folder / name)
            finally:
                beside.unlink(missing_ok=True)
            return missing[name]

        with (ThreadPoolExecutor(_AT_A_TIME) as pool,
              tqdm(total=needed, desc=f"copying {directory}", unit="B", unit_scale=True, disable=None) as bar):
            for size in pool.map(fetch, missing):
                bar.update(size)
    except OSError as error:
        raise DataError(f"{directory} cannot be copied to {folder}: {error}") from error


def put_file(local: str, path: str) -> None:
    """Moves a finished local file to where it belongs."""
    if is_remote(path):
        files, inner = filesystem(path)
        files.put_file(local, inner)
    else:
        shutil.move(local, path)


def remove_file(path: str) -> None:
    """Harmless where there is none."""
    if not is_remote(path):
        Path(path).unlink(missing_ok=True)
        return
    files, inner = filesystem(path)
    if files.exists(inner):
        files.rm_file(inner)
