"""Loads lm-eval's tasks and those of `tasks/`, with their data from the hub or from local files.

It needs the package lm-eval.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import datasets
import lm_eval.tasks
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from dlm_jax.errors import ConfigError, DataError, did_you_mean
from dlm_jax.evaluation.code_eval import Sandbox, used_as_code_eval
from dlm_jax.evaluation.own_tasks import OwnTask
from dlm_jax.evaluation.task_data import digest, find_file, is_cleaned, load_rows

OWN_TASKS = pathlib.Path(__file__).parent / "tasks"
OLD_NAMES = {"siqa": "social_iqa", "satmath": "agieval_sat_math"}


class LoadedTasks(NamedTuple):
    """Tasks with their data.

    Attributes:
      loaded: {"tasks", "groups", "group_map"}, as `lm_eval.evaluator.evaluate` takes it.
      files: for each task of local data {"task", "file", "sha256"}, and of its examples.
    """

    loaded: dict[str, Any]
    files: list[dict[str, str]]

    @property
    def tasks(self) -> dict[str, Any]:
        return self.loaded["tasks"]


def load_tasks(names: Sequence[str], *, data_dir: str | None = None, data_files: Mapping[str, str] | None = None,
               include_path: str | None = None, num_fewshot: int | None = None,
               sandbox: Sandbox | None = None) -> LoadedTasks:
    """Loads tasks, groups and tags by name.

    Args:
      data_dir: folder of local data, as `task_data` describes it; None: the hub.
      data_files: the file of a task, by its name.
      include_path: a folder with YAML files of tasks.
      num_fewshot: examples before each prompt; None: as many as the task says.
      sandbox: runs generated programs; None: tasks that run them are refused.

    Raises:
      ConfigError: a name is unknown, a task cannot be done here, or has not the examples.
      DataError: data cannot be found or read.
    """
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # do not report local files to the hub
    data_files = dict(data_files or {})
    manager, names = _manager(names, include_path)
    for name in data_files:
        if name not in names:
            raise ConfigError(f"--data_files {name}={data_files[name]}: {name} is not among the tasks "
                              f"{', '.join(names)}")
    specs, files = [], []
    try:
        with used_as_code_eval(sandbox or _Refusing()):  # tasks of programs run one as they are loaded
            for name in names:
                path = data_files.get(name)
                if path is None and data_dir is not None and _is_from_elsewhere(manager, name):
                    path = find_file(name, data_dir)
                spec, about = (name, []) if path is None else _local(manager, name, path, data_dir)
                specs.append(spec)
                files += about
            loaded = manager.load(specs)
    except (ConfigError, DataError):
        raise
    except Exception as error:  # of the hub, the network, a task's files or its code
        raise DataError(f"--tasks={','.join(names)} cannot be loaded: {type(error).__name__}: "
                        f"{' '.join(str(error).split())[:500]}") from error
    for name, task in loaded["tasks"].items():
        if getattr(task, "MULTIMODAL", False):
            raise ConfigError(f"the task {name} is not text only, which is not supported; leave it out")
        if getattr(task, "UNSAFE_CODE", False):
            if sandbox is None:
                raise _Refusing.error(name)
            if isinstance(task, OwnTask):
                task.execute = sandbox
        _set_num_fewshot(name, task, num_fewshot)
        task.set_fewshot_seed(DEFAULT_OTHER_SEED)
    return LoadedTasks(loaded, files)


class _Refusing:
    """Stands for a sandbox where programs are not allowed."""

    @staticmethod
    def error(name: str) -> ConfigError:
        return ConfigError(f"the task {name} runs programs that the model writes; allow it with "
                           "--allow_code_execution, and read in the guide to evaluation how they are isolated")

    def compute(self, **_: object) -> None:
        raise self.error("of programs")


def _manager(names: Sequence[str], include_path: str | None) -> tuple[TaskManager, list[str]]:
    """Returns a manager that knows all names, and the names with tags replaced by their tasks."""
    folders = [str(OWN_TASKS)] + ([] if include_path is None else [include_path])
    # The default tasks are thousands of files, so those whose folder's name begins the task's are tried first.
    default = pathlib.Path(lm_eval.tasks.__file__).parent
    likely = [str(folder) for folder in sorted(default.iterdir()) if folder.is_dir() and any(
        f"{name}_".startswith(f"{folder.name}_") for name in names)]
    manager = TaskManager(include_path=[*likely, *folders], include_defaults=False)
    if not set(names) <= set(manager.all_subtasks):
        manager = TaskManager(include_path=folders)
    found: list[str] = []
    for name in names:
        if name not in manager.all_tasks:
            where = "" if include_path is None else f", nor is there a valid YAML file of it in {include_path}"
            guess = f"; it is now {OLD_NAMES[name]}" if name in OLD_NAMES else did_you_mean(name, manager.all_tasks)
            raise ConfigError(f"there is no task {name!r}{guess}{where}; `lm_eval ls tasks` lists lm-eval's, and "
                              "--include_path names a folder with your own")
        entry = manager.task_index[name]
        found += sorted(entry.tags) if name in manager.all_tags else [name]
    return manager, found


def _is_from_elsewhere(manager: TaskManager, name: str) -> bool:
    """Returns whether a task's data is replaced by local files: not if its YAML file names local data itself."""
    entry = manager.task_index[name]
    if name in manager.all_groups:
        raise ConfigError(f"{name} is a group, and --data_dir has files of tasks; name its tasks instead")
    if entry.yaml_path is None:
        return True
    settings = load_yaml(entry.yaml_path, resolve_func=False).get("dataset_kwargs") or {}
    return "data_files" not in settings and "data_dir" not in settings


def _local(manager: TaskManager, name: str, path: str,
           data_dir: str | None) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """Returns a task's settings with a file for its data, and what was read."""
    entry = manager.task_index[name]
    if entry.yaml_path is None:
        raise ConfigError(f"the task {name} is written in Python and reads its own data; leave --data_dir or it out")
    files = [{"task": name, "file": path, "sha256": digest(path)}]
    rows = {"test": load_rows(name, path)}
    if data_dir is not None:
        try:
            shown = find_file(name, data_dir, ("train",))
        except DataError:
            pass
        else:
            rows["train"] = load_rows(name, shown)
            files.append({"task": f"{name} (examples)", "file": shown, "sha256": digest(shown)})
    train = "train" if "train" in rows else None
    splits = {split: datasets.Dataset.from_list(content) for split, content in rows.items()}
    settings = load_yaml(entry.yaml_path) | ({"process_docs": None} if is_cleaned(name, rows["test"]) else {})
    return {**settings, "task": name, "custom_dataset": lambda **_: splits, "dataset_kwargs": None,
            "training_split": train, "validation_split": None, "test_split": "test", "fewshot_split": train}, files


def _set_num_fewshot(name: str, task: Any, number: int | None) -> None:
    """Sets the number of examples as lm-eval does, but raises ConfigError where it would do something else."""
    own = task.get_config("num_fewshot")
    if number and own == 0:
        raise ConfigError(f"--num_fewshot={number}: the task {name} is defined without examples; leave "
                          "--num_fewshot or the task out")
    number = (own or 0) if number is None else number
    if number:
        _check_examples(name, task, number)
    task.set_config(key="num_fewshot", value=number)


def _check_examples(name: str, task: Any, number: int) -> None:
    """Checks that there are enough examples, and that no document is its own (lm-eval checks the test split only)."""
    split, tested = task.fewshot_cfg.split, task.get_config("test_split")
    apart = (task.has_training_docs() or task.fewshot_cfg.samples is not None if split is None
             else tested is not None or split != task.get_config("validation_split"))
    if not apart:
        raise ConfigError(f"the task {name} takes its {number} examples from the documents that it tests, so a "
                          "document may be its own example; put a training file into --data_dir, name another "
                          "fewshot_split in its YAML file, or set --num_fewshot=0")
    available = len(list(task.fewshot_docs())) - (split is not None and split == tested)
    if number > available:
        raise ConfigError(f"the task {name} needs {number} examples and has {available}; set --num_fewshot lower")
