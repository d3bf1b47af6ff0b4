"""Files and directories on local disks and on object stores (`gs://`, `s3://`, whatever fsspec supports) alike.

A local file or directory is written under a temporary name and renamed. An object store cannot rename a directory:
there it is complete if one file, which is written last, exists. Workdirs and exports are `epath` paths, as Orbax needs
them; single files of any store go through fsspec.
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

METADATA_FILE = "dlm_jax.json"  # what an export records for this library alone
_NUM_COPIES = 8  # files that are copied concurrently


def is_remote(path: epath.PathLike) -> bool:
    """Returns whether a path is on an object store."""
    remote = "://" in os.fspath(path)
    if remote:
        _disable_listings_cache()
    return remote


@functools.cache
def _disable_listings_cache() -> None:
    """Other processes and libraries write to a bucket too, so a cached listing is soon outdated."""
    import fsspec  # imported lazily, with all its compressors: local paths do not need it

    for protocol in ("gs", "gcs"):
        fsspec.config.conf.setdefault(protocol, {}).setdefault("use_listings_cache", False)


def ensure_accessible(path: epath.PathLike) -> epath.Path:
    """Returns the path once its store has answered.

    Raises:
      ConfigError: the package for this kind of path is not installed, or the store cannot be reached.
    """
    if not is_remote(path):
        return epath.Path(path)
    scheme = os.fspath(path).partition("://")[0]
    try:
        epath.Path(path).exists()
    except ImportError as error:
        raise ConfigError(f"{path} cannot be reached without a package for {scheme}://: pip install 'dlm-jax[gcs]' "
                          "for gs://") from error
    except Exception as error:  # each store has its own errors: of credentials, of the network, of a missing bucket
        reason = " ".join(" ".join(map(str, error.args)).split())[:300]
        raise ConfigError(f"{path} cannot be reached: {reason or error!r}") from error
    return epath.Path(path)


def filesystem(path: epath.PathLike) -> tuple[Any, str]:
    """Returns the fsspec filesystem of a path, and the path in it.

    Raises:
      DataError: the package for this kind of path is not installed.
    """
    import fsspec

    path = os.fspath(path)
    _disable_listings_cache()
    try:
        return fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as error:
        extra = " (pip install 'dlm-jax[gcs]')" if path.startswith(("gs://", "gcs://")) else ""
        raise DataError(f"{path} cannot be reached: {error}{extra}") from error


def cache_folder() -> Path:
    """Returns this machine's folder for files that can be made or fetched again."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dlm_jax"


# Single files.


def read_file(path: epath.PathLike) -> bytes | None:
    """Returns the content of a file, None without one."""
    files, inner = filesystem(path)
    return files.cat_file(inner) if files.isfile(inner) else None


def write_file(path: epath.PathLike, content: bytes) -> None:
    """Writes a file atomically."""
    if is_remote(path):
        files, inner = filesystem(path)
        files.pipe_file(inner, content)
        return
    temporary = Path(f"{os.fspath(path)}.new")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def remove_file(path: epath.PathLike) -> None:
    """Removes a file if it exists."""
    files, inner = filesystem(path)
    if files.isfile(inner):
        files.rm_file(inner)


def put_file(local: epath.PathLike, path: epath.PathLike) -> None:
    """Moves a finished local file to its final place."""
    if is_remote(path):
        files, inner = filesystem(path)
        files.put_file(os.fspath(local), inner)
    else:
        shutil.move(local, path)


def read_json(path: epath.PathLike) -> dict[str, Any]:
    """Reads a JSON object; raises CheckpointError where the file is missing or holds something else."""
    try:
        content = json.loads(epath.Path(path).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return content


def write_json(path: epath.PathLike, content: object) -> None:
    """Writes a JSON file atomically."""
    write_file(path, (json.dumps(content, indent=2) + "\n").encode())


# Directories.


def make_directory(path: str) -> None:
    """Creates a local directory; object stores have none."""
    if not is_remote(path):
        try:
            Path(path).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"{path} cannot be created: {error}") from error


def files_below(folder: epath.Path, prefix: str = "") -> list[str]:
    """Returns the names of all files below a folder, as a/b, sorted."""
    names = []
    for path in folder.iterdir():
        name = prefix + path.name
        names += files_below(path, name + "/") if path.is_dir() else [name]
    return sorted(names)


def move(folder: epath.Path, to: epath.Path) -> None:
    """Renames a folder; copies and removes it on an object store, where an interruption can keep both."""
    to.parent.mkdir(parents=True, exist_ok=True)
    if not is_remote(folder):
        folder.rename(to)
        return
    for name in files_below(folder):
        (folder / name).copy(to / name, overwrite=True)
    folder.rmtree()


def upload(folder: Path, to: epath.Path, *, last: str | None = None) -> None:
    """Copies all files below a local folder; the file `last` comes last, as the sign that the copy is complete."""
    for name in sorted(files_below(epath.Path(folder)), key=lambda name: name == last):
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        with open(Path(folder) / name, "rb") as source, (to / name).open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 24)


def fetch_files(directory: epath.PathLike, sizes: Mapping[str, int], folder: Path) -> None:
    """Copies files into a local folder, several at a time and each atomically.

    Args:
      sizes: bytes by name; a file of that size in the folder is not copied again.

    Raises:
      DataError: the folder has too little space, or a file cannot be read or written.
    """
    from tqdm import tqdm

    files, inner = filesystem(directory)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        missing = {name: size for name, size in sizes.items()
                   if not (folder / name).is_file() or (folder / name).stat().st_size != size}
        needed, free = sum(missing.values()), shutil.disk_usage(folder).free
        if needed > free:
            raise DataError(f"{directory} has {needed / 2**30:.1f} GiB to copy, and {folder} has {free / 2**30:.1f} "
                            "GiB free; name a larger place with data.cache_dir, or mount the bucket and give its local "
                            "path")

        def fetch(name: str) -> int:
            temporary = folder / f".{name}.{os.getpid()}"
            try:
                files.get_file(f"{inner.rstrip('/')}/{name}", str(temporary))
                os.replace(temporary, folder / name)
            finally:
                temporary.unlink(missing_ok=True)
            return missing[name]

        with (ThreadPoolExecutor(_NUM_COPIES) as pool,
              tqdm(total=needed, desc=f"copying {directory}", unit="B", unit_scale=True, disable=None) as bar):
            for size in pool.map(fetch, missing):
                bar.update(size)
    except OSError as error:
        raise DataError(f"{directory} cannot be copied to {folder}: {error}") from error


def local_copy(directory: epath.PathLike) -> Path:
    """Returns a local folder with the files (not the folders) of a remote one; a local one as it is.

    The copy is kept in the user's cache. JSON files are always fetched again, others if their size differs.
    """
    if not is_remote(directory):
        return Path(directory)
    folder = _copies_of(directory)
    sizes = {path.name: path.stat().length for path in ensure_accessible(directory).iterdir() if path.is_file()}
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name not in sizes or path.suffix == ".json":
            path.unlink()
    fetch_files(directory, sizes, folder)
    return folder


def local_file(path: epath.PathLike) -> Path:
    """Returns a local copy of a file on an object store, kept in the user's cache and copied again if its size differs.

    Raises:
      CheckpointError: there is no such file.
    """
    remote = ensure_accessible(path)
    if not remote.is_file():
        raise CheckpointError(f"there is no file {path}")
    folder = _copies_of(path)
    fetch_files(remote.parent, {remote.name: remote.stat().length}, folder)
    return folder / remote.name


def _copies_of(path: epath.PathLike) -> Path:
    """Returns the folder in the user's cache for copies of a remote file or folder."""
    return cache_folder() / "copies" / hashlib.sha256(os.fspath(path).rstrip("/").encode()).hexdigest()[:16]


@contextlib.contextmanager
def atomic_directory(directory: epath.PathLike, last: str = "config.json") -> Iterator[Path]:
    """Yields a folder that becomes `directory` at the end, and replaces an earlier export there.

    Args:
      last: the file without which a directory is no export; on an object store it is written last.

    Raises:
      CheckpointError: the directory holds something other than an earlier export.
    """
    directory = ensure_accessible(directory) if is_remote(directory) else Path(directory).expanduser()
    check_replaceable(directory)
    if is_remote(directory):
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
            (directory / last).unlink(missing_ok=True)  # the earlier export is incomplete from here on
            upload(Path(folder), directory, last=last)
        return
    folder, replaced = (directory.parent / f".{directory.name}.{kind}-{os.getpid()}" for kind in ("new", "old"))
    folder.mkdir(parents=True)
    try:
        yield folder
        if directory.exists():
            directory.rename(replaced)
        folder.rename(directory)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def check_replaceable(directory: epath.Path | Path) -> None:
    """Raises CheckpointError if a directory holds something other than an earlier export."""
    if not directory.exists():
        return
    card = directory / "README.md"
    if not directory.is_dir() or (any(directory.iterdir())
                                  and not (card.is_file() and "library_name: dlm_jax" in card.read_text())):
        raise CheckpointError(f"{directory} holds something other than an earlier export; choose a new directory")


def read_metadata(directory: Path) -> dict[str, Any]:
    """Reads what an export records for this library; empty for another checkpoint."""
    return read_json(directory / METADATA_FILE) if (directory / METADATA_FILE).is_file() else {}
