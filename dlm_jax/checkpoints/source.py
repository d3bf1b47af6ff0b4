"""Which checkpoint a source means: a directory or a GGUF file, a hub id, or a training `workdir[@step]`.

Nothing here reads weights or imports JAX, so that a wrong path is refused at once.
"""

import re
from pathlib import Path
from typing import Any

from etils import epath

from dlm_jax.checkpoints.gguf_file import is_gguf, read_gguf
from dlm_jax.errors import CheckpointError, did_you_mean
from dlm_jax.storage import ensure_accessible, is_remote, local_copy, local_file, read_json, read_metadata

LORA_FILE = "adapter.json"  # of a run with LoRA: see `workdir.LoRABase`
PARENT_FILE = "parent.json"  # of a run that keeps a copy of its parent: see `workdir.ParentRecord`
DRAFTER_FILE = "drafter.json"  # of a run that trains a drafter: see `workdir.DrafterRecord`
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_HUB_FILE = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+)/([\w./-]+\.gguf)")  # a GGUF file in a repository
_SETTINGS = ["*.json", "*.txt", "*.jinja", "tokenizer.model"]


def is_workdir(path: epath.PathLike) -> bool:
    """Returns whether a run has saved a checkpoint in this directory, with or without `@step`."""
    directory, _ = split_step(path)
    directory = ensure_accessible(directory)
    return (directory / "config.json").is_file() and (directory / "checkpoints").is_dir()


def has_lora(path: epath.PathLike) -> bool:
    """Returns whether this is the workdir of a run with LoRA, whose checkpoints hold only what is trained."""
    return is_workdir(path) and (split_step(path)[0] / LORA_FILE).is_file()


def split_step(path: epath.PathLike) -> tuple[epath.Path, str | None]:
    """Splits `runs/a@500` into (`runs/a`, "500"); the step is None without `@`, and for a directory of that name."""
    head, at, step = str(path).rpartition("@")
    if not at or epath.Path(path).is_dir() or not (step.isdecimal() or step == "best"):
        return epath.Path(path), None
    return epath.Path(head), step


def absolute_source(source: str) -> str:
    """Returns a source that resolves from any working directory: the absolute path of what is there, with its step."""
    directory, step = split_step(source)
    if is_remote(source) or not _is_here(directory.expanduser()):
        return source
    return str(directory.expanduser().resolve()) + ("" if step is None else f"@{step}")


def check_source(source: str) -> None:
    """Refuses a source from which no model can be loaded, as far as its files' names tell.

    Raises:
      CheckpointError: there is no such directory, repository or step, or the directory holds no checkpoint.
    """
    if is_remote(source):
        return  # it is looked at once, when it is opened
    directory, step = split_step(source)
    if is_workdir(source):
        saved = sorted(int(path.name) for path in (directory / "checkpoints").iterdir() if path.name.isdecimal())
        if not saved:
            raise CheckpointError(f"the run in {directory} has not saved a checkpoint yet")
        if step not in (None, "best") and int(step) not in saved:
            raise CheckpointError(f"{directory} has no checkpoint of step {step}; it has {', '.join(map(str, saved))}")
        return
    directory = locate(source, weights=False)
    if is_gguf(directory):
        read_gguf(directory)
    elif not any((directory / name).is_file() for name in ("config.json", "adapter_config.json")):
        files = sorted(directory.glob("*.gguf"))
        raise CheckpointError(f"{source} has no config.json, so it holds no model; " + (
            f"give the GGUF file in it, {files[0]}" if files else
            "give the directory of a checkpoint, the workdir of a run, or a GGUF file"))


def find_base(source: str, beside: epath.PathLike) -> str:
    """Returns the source of an adapter's base: `source` if it exists, else what is so named in or next to `beside`.

    If neither exists, returns `source` unchanged: it may be a hub id; otherwise loading it fails with a clear error.
    """
    directory, step = split_step(source)
    if is_remote(source) or _is_here(directory.expanduser()):
        return source
    name = directory.name if directory.is_absolute() else directory
    for folder in (epath.Path(beside), epath.Path(beside).parent):
        if _is_here(folder / name):
            return f"{folder / name}" + ("" if step is None else f"@{step}")
    return source


def _is_here(path: epath.PathLike) -> bool:
    """Returns whether there is a directory or a GGUF file of this path."""
    return epath.Path(path).is_dir() or (epath.Path(path).is_file() and is_gguf(Path(path)))


def is_hub_id(source: str) -> bool:
    """Returns whether a source can only be a hub id: it has the form of one, and nothing here has that name."""
    return _HUB_ID.fullmatch(source) is not None and not Path(source).exists() and not is_gguf(Path(source))


def shipped_model(name: str) -> Path | None:
    """Returns the directory of a model that comes with the library, as "stories" does; None if none has this name."""
    package = Path(__file__).parents[1]
    folders = (folder / "assets" / name for folder in (package, package.parent))  # installed, or in a checkout
    is_name = re.fullmatch(r"[\w-]+", name) is not None
    return next((folder for folder in folders if is_name and (folder / "config.json").is_file()), None)


def locate(path_or_hub_id: str | Path, *, weights: bool = True) -> Path:
    """Returns the local directory or GGUF file of a checkpoint: one of that path, else one that comes with the
    library, else the hub's of that id, or of the form `org/repository/file.gguf`, which is downloaded or found in the
    hub's cache.

    Args:
      weights: False fetches only the configuration and tokenizer.

    Raises:
      CheckpointError: there is no such directory or file, or the hub cannot be reached or does not have it.
    """
    if is_remote(path_or_hub_id):
        if str(path_or_hub_id).endswith(".gguf"):
            return local_file(path_or_hub_id)
        if not ensure_accessible(path_or_hub_id).is_dir():
            raise CheckpointError(f"there is no directory {path_or_hub_id}")
        return local_copy(path_or_hub_id)
    path = Path(path_or_hub_id).expanduser()
    if path.is_dir():
        return path
    if (shipped := shipped_model(str(path_or_hub_id))) is not None and not path.exists():
        return shipped
    name = str(path_or_hub_id)
    if is_gguf(path):
        if path.exists():
            return path
        if (on_hub := _HUB_FILE.fullmatch(name)) is None or path.parent.is_dir():
            raise CheckpointError(f"there is no file {path}{_similar(path)}")
        repository, file = on_hub.groups()
        parts = re.sub(r"-\d{5}(-of-\d{5}\.gguf)$", r"-*\1", file)  # all files, if the model is split
        directory = _download(repository, [parts], path)
        if not (directory / file).is_file():
            raise CheckpointError(f"the repository {repository} on the hub has no file {file}")
        return directory / file
    if path.exists():
        raise CheckpointError(f"{path} is a file, and not in GGUF; give the directory that holds config.json and the "
                              "weights")
    if not _HUB_ID.fullmatch(name):
        raise CheckpointError(f"there is no directory {name}{_similar(path)}")
    # Top-level files alone: folders hold other formats of the same weights.
    directory = _download(name, [*_SETTINGS, *(["*.safetensors"] if weights else [])], path, ["*/*"])
    if weights and not any(directory.glob("*.safetensors")):
        directory = _download(name, [*_SETTINGS, "*.bin"], path, ["*/*"])
    return directory


def _download(repository: str, patterns: list[str], path: Path, ignore_patterns: list[str] | None = None) -> Path:
    """Returns the directory of a repository's files of these patterns, which are fetched or found in the hub's cache.

    Args:
      path: what may have been meant, for the hint in an error.
    """
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(repository, allow_patterns=patterns, ignore_patterns=ignore_patterns))
    except errors.GatedRepoError as error:
        raise CheckpointError(f"the hub gives {repository} only to those who accepted its terms: accept them on its "
                              "page, then log in with `hf auth login`") from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise CheckpointError(f"neither a directory here nor a repository on the hub is called "
                              f"{repository}{_similar(path)}") from error
    except (OSError, errors.HfHubHTTPError) as error:
        raise CheckpointError(f"{repository} is not a directory here{_similar(path)}, and the Hugging Face hub cannot "
                              "be reached to fetch it; check the network, or give the path of a local copy") from error


def settings_folder(source: str) -> Path:
    """Returns the local directory or GGUF file with the configuration and the tokenizer of a source; as `locate`."""
    return local_copy(split_step(source)[0] / "model") if is_workdir(source) else locate(source, weights=False)


def read_recipe(source: str) -> dict[str, Any]:
    """Returns the settings of the run that trained a source, by dotted keys; {} where unknown."""
    if is_workdir(source):
        return read_json(split_step(source)[0] / "config.json")
    return read_metadata(locate(source, weights=False)).get("recipe") or {}


def _similar(path: Path) -> str:
    """Returns a hint at a directory or GGUF file beside `path` with a name like its own."""
    folder = path.parent
    names = [other.name for other in folder.iterdir() if other.is_dir() or other.suffix == ".gguf"
             ] if folder.is_dir() else []
    return did_you_mean(path.name, names, prefix="" if folder == Path() else f"{folder}/")
