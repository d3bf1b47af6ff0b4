"""Directories that appear whole, and what goes into them."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from etils import epath

from dlm_jax.errors import CheckpointError
from dlm_jax.storage import is_remote, reached, upload

NOTES = "dlm_jax.json"  # what an export says for this library alone


@contextlib.contextmanager
def appearing_whole(directory: epath.PathLike, last: str = "config.json") -> Iterator[Path]:
    """Gives a folder to write into, which becomes `directory` once everything is in it.

    Args:
      last: the file without which it is no export; on an object store it is written last.

    Raises:
      CheckpointError: the directory holds something other than an earlier export.
    """
    directory = reached(directory) if is_remote(directory) else Path(directory).expanduser()
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


def read_notes(directory: Path) -> dict[str, Any]:
    """The notes of an export, empty where it has none."""
    return read_json(directory / NOTES) if (directory / NOTES).is_file() else {}


def read_json(path: Path) -> dict[str, Any]:
    """Raises CheckpointError where the file is not a JSON object."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return content


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
