"""Small files on local disks and object stores (`gs://`, `s3://`, whatever fsspec knows) alike."""

import os
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dlm_jax.errors import DataError
from dlm_jax.storage import is_remote

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
