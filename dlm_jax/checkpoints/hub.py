"""Resolves a directory (on an object store too) or a hub id to a local directory."""

import re
from pathlib import Path

from etils import epath

from dlm_jax.errors import CheckpointError
from dlm_jax.storage import ensure_accessible, is_remote, local_copy

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_SETTINGS = ["*.json", "*.txt", "*.jinja", "tokenizer.model"]


def find_base(source: str, beside: epath.PathLike) -> str:
    """Returns the source of an adapter's base: `source` if it exists, else a directory so named in or next to `beside`.

    If neither exists, returns `source` unchanged: it may be a hub id; otherwise loading it fails with a clear error.
    """
    named, at, step = source.rpartition("@")
    directory, step = (named, at + step) if at and not Path(source).is_dir() else (source, "")
    if is_remote(directory) or Path(directory).expanduser().is_dir():
        return source
    name = Path(directory).name if Path(directory).is_absolute() else directory
    for folder in (epath.Path(beside), epath.Path(beside).parent):
        if (folder / name).is_dir():
            return f"{folder / name}{step}"
    return source


def locate(path_or_hub_id: str | Path, *, weights: bool = True) -> Path:
    """Returns the local directory of a checkpoint; a hub id is downloaded, or found in the hub's cache.

    Args:
      weights: False fetches only the configuration and tokenizer.

    Raises:
      CheckpointError: there is no such directory, or the hub cannot be reached or does not have it.
    """
    if is_remote(path_or_hub_id):
        if not ensure_accessible(path_or_hub_id).is_dir():
            raise CheckpointError(f"there is no directory {path_or_hub_id}")
        return local_copy(path_or_hub_id)
    path = Path(path_or_hub_id).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{path} is a file; give the directory that holds config.json and the weights")
    name = str(path_or_hub_id)
    if not _HUB_ID.fullmatch(name):
        raise CheckpointError(f"there is no directory {name}")
    from huggingface_hub import errors, snapshot_download

    def download(patterns: list[str]) -> Path:  # top-level files: folders hold other formats of the same weights
        return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=["*/*"]))

    try:
        directory = download([*_SETTINGS, *(["*.safetensors"] if weights else [])])
        if weights and not any(directory.glob("*.safetensors")):
            directory = download([*_SETTINGS, "*.bin"])
    except errors.GatedRepoError as error:
        raise CheckpointError(f"the hub gives {name} only to those who accepted its terms: accept them on its page, "
                              "then log in with `hf auth login`") from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise CheckpointError(f"neither a directory here nor a repository on the hub is called {name}") from error
    except (OSError, errors.HfHubHTTPError) as error:
        raise CheckpointError(f"{name} is not a directory here, and the Hugging Face hub cannot be reached to fetch "
                              "it; check the network, or give the path of a local copy") from error
    return directory
