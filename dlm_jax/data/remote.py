"""Small files on local disks and object stores (`gs://`, `s3://`, whatever fsspec knows) alike."""

import os
import shutil
from pathlib import Path

from dlm_jax.errors import DataError


def is_remote(path: str) -> bool:
    return "://" in path


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
