"""Digests of a checkpoint's files: Orbax restores a flipped bit without a word, these tell.

They are written into the checkpoint before it is committed, so that whatever is committed has them.
"""

import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from etils import epath

from dlm_jax.storage import files_below

FILE = "digests.json"
_THREADS = 8  # hashing and reading give up the interpreter's lock
# Orbax writes into these once more when it commits; no array depends on them.
_NOT_DATA = (FILE, "_CHECKPOINT_METADATA", "commit_success.txt")


def write_digests(directory: epath.Path) -> None:
    """Writes the SHA-256 of every file below `directory` into its `digests.json`."""
    names = [name for name in files_below(directory) if name not in _NOT_DATA]
    (directory / FILE).write_text(json.dumps(_digests(directory, names), indent=0) + "\n")


def damage(directory: epath.Path, items: Iterable[str] | None = None) -> str | None:
    """What is wrong with a checkpoint, in a few words, or None; of `items` (its folders) only where they are given."""
    try:
        wanted = json.loads((directory / FILE).read_text())
        if not all(isinstance(digest, str) for digest in wanted.values()):
            return f"{FILE} is damaged"
    except FileNotFoundError:
        return f"{FILE} is missing"
    except (ValueError, AttributeError):
        return f"{FILE} is damaged"
    if items is not None:
        wanted = {name: digest for name, digest in wanted.items() if name.split("/")[0] in tuple(items)}
    missing = [name for name in wanted if not (directory / name).is_file()]
    if missing:
        return f"{missing[0]} is missing"
    found = _digests(directory, list(wanted))
    return next((f"{name} is not what was written" for name in wanted if found[name] != wanted[name]), None)


def _digests(directory: epath.Path, names: list[str]) -> dict[str, str]:
    def digest(name: str) -> str:
        with (directory / name).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(names, pool.map(digest, names), strict=True))
