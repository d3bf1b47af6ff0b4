"""What a task is asked on: its file or dataset, the examples and the text before each prompt, and their digests."""

import argparse
import pathlib
from typing import TYPE_CHECKING

from dlm_jax.errors import ConfigError

if TYPE_CHECKING:
    from dlm_jax.evaluation.run import Job
    from dlm_jax.evaluation.tasks import Task


def read_prompt_file(path: str | None) -> tuple[str, dict[str, str]]:
    """The text that stands before each prompt, and where it is from."""
    from dlm_jax.evaluation.tasks import digest

    if path is None:
        return "", {}
    try:
        text = pathlib.Path(path).read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ConfigError(f"--prompt_file={path} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"--prompt_file={path} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    if not text:
        raise ConfigError(f"--prompt_file={path} is empty; write a text in it, or leave it out")
    return text + "\n\n", {"prompt_file": path, "prompt_sha256": digest(path)}


def make_job(task: "Task", arguments: argparse.Namespace, release: bool, prefix: str) -> "tuple[Job, dict[str, str]]":
    """A task with its items, and the file they are of with its digest; without one, what the hub has of the task."""
    from dlm_jax.evaluation.run import Job
    from dlm_jax.evaluation.tasks import digest, hub_spec, load_items, shots_prefix

    named = dict(_named_file(text) for text in arguments.data_files or ())
    for name in named:
        if name not in arguments.tasks.split(","):
            raise ConfigError(f"--data_files {name}={named[name]}: {name} is not among --tasks={arguments.tasks}")
    path = named.get(task.name) or _found(task, arguments.data_dir)
    items = load_items(task, path, release=release, limit=arguments.limit)
    about = {"task": task.name, "file": path, "sha256": digest(path)}
    if arguments.shots:
        if arguments.data_dir is None and (task.name in named or task.hub is None):
            raise ConfigError("--shots needs --data_dir, where the tasks' training files are")
        examples = hub_spec(task, "train") if arguments.data_dir is None else _found(task, arguments.data_dir, "train")
        shown = load_items(task, examples, limit=arguments.shots)
        if len(shown) < arguments.shots:
            raise ConfigError(f"--shots={arguments.shots}, and {examples} has {len(shown)} items")
        prefix = shots_prefix(shown)
        about |= {"shots_file": examples, "shots_sha256": digest(examples)}
    return Job(task, items, prefix), about


def _found(task: "Task", data_dir: str | None, split: str | None = None) -> str:
    """The task's file in a folder, or its dataset on the hub."""
    from dlm_jax.evaluation.tasks import find_file, hub_spec

    if data_dir is not None:
        return find_file(task, data_dir, None if split is None else (split,))
    if task.hub is None:
        raise ConfigError(f"where is the data of the task {task.name}? Name a folder with --data_dir, or its file with "
                          f"--data_files {task.name}=FILE")
    return hub_spec(task, split)


def _named_file(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if not equals or not path:
        raise ConfigError(f"--data_files {text}: write TASK=FILE")
    return name, path
