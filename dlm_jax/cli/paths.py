"""Checks of the paths that a command was given, before it imports anything heavy: a wrong one is refused at once.

`check_paths` looks at every argument that names a path, by the argument's name, and `check_run` at those of a recipe.
Paths on object stores are left to what opens them.
"""

import argparse
import os
import pathlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from dlm_jax.errors import ConfigError, DataError, did_you_mean

if TYPE_CHECKING:
    from dlm_jax.training.config import TrainConfig


def check_paths(arguments: argparse.Namespace) -> None:
    """Raises a DLMError that names a path from which nothing can be read, or to which nothing can be written."""
    for name, check in CHECKS.items():
        value = getattr(arguments, name, None)
        for path in value if isinstance(value, list) else [value]:
            if path is not None and "://" not in path:
                check(path)


def check_run(config: "TrainConfig", workdir: str | None = None) -> None:
    """Checks the paths of a recipe and its overrides, as `check_paths` does those of a command.

    A run that has started needs none of them at once: its workdir has the model, and perhaps the rows.
    """
    if workdir is not None and ("://" in workdir or (pathlib.Path(workdir) / "checkpoints").is_dir()):
        return
    named = [(check_model, config.model.source), (check_file, config.data.examples.chat_template),
             (check_new_folder, config.data.cache_dir),
             *((check_data, spec) for spec in (*config.data.train, *config.data.validation))]
    for check, path in named:
        if path and "://" not in path:
            check(path)


def check_model(source: str) -> None:
    """Checks a directory, a GGUF file, a hub id, or a workdir[@step]."""
    from dlm_jax.checkpoints.source import check_source

    check_source(source)


def check_drafter(name: str) -> None:
    """Checks a drafter that is not built in: the workdir of a run, a directory, or a hub id."""
    from dlm_jax.checkpoints.source import is_hub_id, is_workdir, locate

    if name not in ("none", "ngram", "self") and not is_workdir(name) and (not is_hub_id(name) or "/" not in name):
        locate(name, weights=False)


def check_base(source: str) -> None:
    """Checks a base, as far as it is a path: a plain name may be a directory beside the adapter, or on the hub."""
    from dlm_jax.checkpoints.source import is_hub_id

    if not is_hub_id(source):
        check_model(source)


def check_tokenizer(source: str) -> None:
    """Checks a directory or a hub id, whose model need not be there."""
    from dlm_jax.checkpoints.source import is_workdir, locate

    if not is_workdir(source):
        locate(source, weights=False)


def check_data(spec: str) -> None:
    """Checks a file, a glob, or a directory made by `dlm prepare`; tfds:NAME and hf:NAME are left to their packages."""
    from dlm_jax.data.corpus import prepared_manifest
    from dlm_jax.data.files import find_files

    if not spec.startswith(("tfds:", "hf:")) and prepared_manifest(spec) is None:
        find_files(spec)


def check_file(path: str) -> None:
    """Checks a file to read."""
    if pathlib.Path(path).is_file():
        return
    folder, name = os.path.split(path)
    names = os.listdir(folder or ".") if os.path.isdir(folder or ".") else []
    raise DataError(f"there is no file {path}{did_you_mean(name, names, prefix=folder and f'{folder}/')}")


def check_folder(path: str) -> None:
    """Checks a folder to read from."""
    if not pathlib.Path(path).is_dir():
        raise DataError(f"there is no folder {path}")


def check_new_folder(path: str) -> None:
    """Checks a folder that will be made, with those above it, or that exists and will be written into."""
    folder = pathlib.Path(path).expanduser().absolute()
    existing = next(above for above in (folder, *folder.parents) if above.exists())
    if not existing.is_dir():
        what = "is a file" if existing == folder else f"cannot be made, since {existing} is a file"
        raise ConfigError(f"{path} {what}; name another folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        what = "" if existing == folder else f", as {existing} is not writable"
        raise ConfigError(f"nothing can be written into {path}{what}; name another folder, or change its permissions")


def check_new_file(path: str) -> None:
    """Checks a file that will be written, or replaced; its folder exists."""
    file = pathlib.Path(path)
    if path == "-":
        return
    if not file.parent.is_dir():
        raise ConfigError(f"there is no folder {file.parent} for {file.name}; make it, or name another")
    if file.is_dir():
        raise ConfigError(f"{path} is a folder; name a file")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise ConfigError(f"{path} cannot be written; name another file, or change the permissions of its folder")


def check_output(path: str) -> None:
    """Checks a file that will be written and must not exist yet."""
    if pathlib.Path(path).exists():
        raise ConfigError(f"{path} exists already; name another file, or remove it")
    check_new_file(path)


def _check_export(path: str) -> None:
    """Checks a folder that will be written, or a GGUF file."""
    (check_new_file if path.endswith(".gguf") else check_new_folder)(path)


def _check_task_file(text: str) -> None:
    """Checks TASK=FILE; what is not of that form is refused later."""
    path = text.partition("=")[2]
    if path and not path.startswith(("hf:", "tfds:")):
        check_file(path)


# The arguments of all commands that name paths.
CHECKS: dict[str, Callable[[str], None]] = {
    "model": check_model, "drafter": check_drafter, "base": check_base, "parent": check_model, "judge": check_model,
    "tokenizer": check_tokenizer, "data": check_data, "validation": check_data, "examples": check_data,
    "prompts": check_file, "chat_template": check_file,
    "data_dir": check_folder, "include_path": check_folder, "data_files": _check_task_file,
    "workdir": check_new_folder, "output": _check_export,
    "out": check_output, "json": check_new_file, "trace": check_new_file,
}
