"""`dlm evaluate --lm_eval`: tasks of lm-eval, the field's harness, with the parent on the same tasks beside the model.

Few-shot examples are drawn with the harness's own seeds, so that they are those that its users have.
"""

import argparse
import contextlib
import importlib.metadata
import io
import json
import logging
import pathlib
import random
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from dlm_jax.cli import evaluate_writing
from dlm_jax.cli.evaluate_tasks import PACKAGES, load_candidates
from dlm_jax.cli.shared import check_output, write_result
from dlm_jax.errors import ConfigError, DataError, did_you_mean

_BOOTSTRAPS = 1000  # for the errors of perplexities and the like; the harness's 100000 take minutes
_SETTINGS = ("model", "parent", "objective", "mask_token", "dtype", "lm_eval", "lm_eval_dir", "limit", "shots",
             "num_samples", "seed", *evaluate_writing.FLAGS)


def add_arguments(parser: argparse._ArgumentGroup) -> None:
    """What is not given stays None; `evaluate` knows the defaults."""
    parser.add_argument("--lm_eval", metavar="TASK,...", help="tasks, groups and tags of lm-eval; --limit, --shots, "
                        "--parent and --out are as for --tasks")
    parser.add_argument("--lm_eval_dir", metavar="DIR", help="holds tasks of your own, as YAML files; their relative "
                        "data_files are found from the current folder")


def run(arguments: argparse.Namespace) -> None:
    names = _check(arguments)
    from dlm_jax.evaluation.lm_eval import HarnessLM  # refuses where lm-eval is missing
    from dlm_jax.storage import write_json

    if arguments.num_samples is None:
        arguments.num_samples = 16
    with _quiet():
        tasks = _load_tasks(names, arguments.lm_eval_dir)
    writes = any(task.OUTPUT_TYPE == "generate_until" for task in tasks["tasks"].values())
    evaluate_writing.check_used(arguments, writes, f"--lm_eval={arguments.lm_eval}")
    _set_shots(tasks["tasks"], arguments.shots)
    found, shortened = {}, {}
    for eval_model in load_candidates(arguments):
        # In a multiple choice only exact_match is made of what is greedy.
        exact = any(task.OUTPUT_TYPE == "multiple_choice" and "exact_match" in task.aggregation()
                    for task in tasks["tasks"].values())
        lm = HarnessLM(eval_model, num_steps=arguments.num_steps, greedy=exact or None)
        with _quiet():
            found[eval_model.name] = _evaluate(lm, tasks, arguments.limit, samples=arguments.out is not None)
        shortened |= lm.shortened
    result = {"models": list(found), "settings": {name: getattr(arguments, name) for name in _SETTINGS},
              "versions": {name: importlib.metadata.version(name) for name in (*PACKAGES, "lm-eval")},
              "shortened": shortened, "lm_eval": found}
    if arguments.out:
        write_json(pathlib.Path(arguments.out), result)
    for one in found.values():
        one.pop("samples", None)
    write_result(arguments.json, result, _table(result, arguments.objective))


def _check(arguments: argparse.Namespace) -> list[str]:
    """The tasks' names. What can be known to be wrong before anything is loaded is refused."""
    for name, least in (("limit", 1), ("shots", 0), ("num_steps", 1), ("num_samples", 1), ("batch_size", 1)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name} must be at least {least}, got {value}")
    names = arguments.lm_eval.split(",")
    if len(set(names)) < len(names):
        raise ConfigError(f"--lm_eval={arguments.lm_eval} names a task twice")
    if arguments.lm_eval_dir is not None and not pathlib.Path(arguments.lm_eval_dir).is_dir():
        raise ConfigError(f"there is no folder {arguments.lm_eval_dir}; name the one that holds your tasks' YAML files "
                          "with --lm_eval_dir")
    if arguments.out:
        if pathlib.Path(arguments.out).suffix != ".json":
            raise ConfigError(f"--out={arguments.out} must end in .json")
        check_output(arguments.out)
    return names


def _load_tasks(names: Sequence[str], folder: str | None) -> dict[str, Any]:
    """The harness's tasks and groups, with their data."""
    import datasets
    from lm_eval.tasks import TaskManager

    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # local files are no one else's business
    manager = None if folder is None else TaskManager(include_path=folder, include_defaults=False)
    if manager is None or not set(names) <= set(manager.all_subtasks):  # else the thousands of others need no reading
        manager = TaskManager(include_path=folder)
    for name in names:
        if name not in manager.all_tasks:
            where = "" if folder is None else f", nor is there a sound YAML file of it in {folder}"
            raise ConfigError(f"the harness has no task {name!r}{did_you_mean(name, manager.all_tasks)}{where}; `lm_eval ls "
                              "tasks` lists them, and --lm_eval_dir names a folder with your own")
    try:
        loaded = manager.load(list(names))
    except Exception as error:  # of the hub, the network, a task's files or its code
        raise DataError(f"--lm_eval={','.join(names)} cannot be loaded: {type(error).__name__}: "
                        f"{' '.join(str(error).split())}") from error
    for name, task in loaded["tasks"].items():
        for flag, does in (("UNSAFE_CODE", "runs code that the model writes"), ("MULTIMODAL", "is not of text alone")):
            if getattr(task, flag, False):
                raise ConfigError(f"the task {name} {does}, which this command does not; leave it out")
    return loaded


def _set_shots(tasks: dict[str, Any], shots: int | None) -> None:
    """As the harness does, but what it would pass over in silence is refused."""
    for name, task in tasks.items():
        own = task.get_config("num_fewshot")
        if shots and own == 0:
            raise ConfigError(f"--shots={shots}: the task {name} is defined without examples; leave --shots or the "
                              "task out")
        if shots:
            _check_examples(name, task, shots)
        task.set_config(key="num_fewshot", value=(own or 0) if shots is None else shots)


def _check_examples(name: str, task: Any, shots: int) -> None:
    """There are enough, and a document is never its own example: the harness sees to it only in the test split."""
    split, tested = task.fewshot_cfg.split, task.get_config("test_split")
    apart = (task.has_training_docs() or task.fewshot_cfg.samples is not None if split is None
             else tested is not None or split != task.get_config("validation_split"))
    if not apart:
        raise ConfigError(f"--shots={shots}: the task {name} takes examples from the documents it is tested on, so "
                          "that one may be its own example; name another fewshot_split in its YAML file, or leave "
                          "--shots out")
    available = len(list(task.fewshot_docs())) - (split is not None and split == tested)
    if shots > available:
        raise ConfigError(f"--shots={shots}, and the task {name} has {available} examples; ask for fewer")


def _evaluate(lm: Any, tasks: dict[str, Any], limit: int | None, *, samples: bool) -> dict[str, Any]:
    """The harness's results, as JSON has them."""
    import numpy as np
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
    from lm_eval.evaluator import evaluate
    from lm_eval.utils import handle_non_serializable

    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)  # noqa: NPY002  # what tasks of the harness draw from
    for task in tasks["tasks"].values():
        task.set_fewshot_seed(DEFAULT_OTHER_SEED)
    results = evaluate(lm=lm, task_dict=tasks, limit=limit, bootstrap_iters=_BOOTSTRAPS, log_samples=samples)
    return json.loads(json.dumps(results, default=handle_non_serializable))


def _table(result: dict[str, Any], objective: str) -> str:
    from lm_eval.utils import make_table

    lines = []
    for model, found in result["lm_eval"].items():
        lines += [model, "", make_table(found).strip(), ""]
        lines += [make_table(found, "groups").strip(), ""] if "groups" in found else []
    if objective == "diffusion":
        lines.append(f"Likelihoods of {result['models'][0]} are bounds: its perplexities are at most these.")
    lines += [f"{task} asks for texts of {asked} tokens, and no more than {written} are written, half of a row."
              for task, (asked, written) in result["shortened"].items()]
    return "\n".join(lines).strip()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The harness says nothing of its own; only on a terminal does it show how far it is."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        if not sys.stderr.isatty():
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        yield
