"""Runs lm-eval's tasks on a model and on its parent, and compares them item by item.

It needs the package lm-eval.
"""

import contextlib
import dataclasses
import io
import json
import logging
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.evaluator import evaluate as lm_eval_evaluate
from lm_eval.utils import handle_non_serializable

from dlm_jax.errors import ConfigError
from dlm_jax.evaluation.compare import Mean, aggregate_of, is_comparable, monte_carlo_error, paired_difference
from dlm_jax.evaluation.eval_model import EvalModel
from dlm_jax.evaluation.lm_eval import Cost, LmEvalAdapter
from dlm_jax.evaluation.reference_protocol import ReferenceAdapter, ReferenceTask
from dlm_jax.evaluation.task_loading import LoadedTasks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Record = dict[str, Any]
_BOOTSTRAPS = 100  # of lm-eval's own errors, which are shown for groups only
_KEPT = ("doc_id", "target", "arguments", "resps", "filtered_resps", "doc_hash", "prompt_hash")  # of lm-eval's samples


class Evaluation(NamedTuple):
    """What a run found.

    Attributes:
      tasks: {task: {"items", "metrics": {metric: {"models": {name: Mean}, "difference": Difference or None}},
        "costs": {name: {"seconds", "tokens", "passes"}}}}.
      groups: {group: {name: {metric: Mean}}}, aggregated by lm-eval.
      records: one per item, model and filter, with its values.
      shortened: (requested tokens, generated tokens) of tasks whose texts are shorter than they ask for.
    """

    tasks: dict[str, Any]
    groups: dict[str, Any]
    records: list[Record]
    shortened: dict[str, tuple[int, int]]


class _Found(NamedTuple):
    """Of one model: lm-eval's results, values of items and those by halves, [task][metric, filter]; and costs."""

    results: dict[str, Any]
    values: dict[str, dict[tuple[str, str], list[Any]]]
    halves: dict[str, dict[tuple[str, str], tuple[list[Any], list[Any]]]]
    costs: dict[str, Cost]


def evaluate(loaded: LoadedTasks, eval_models: Sequence[EvalModel], *, reference: bool = False,
             limit: int | None = None, num_steps: int | None = None, judge: EvalModel | None = None, seed: int = 0,
             tokenizers: "Sequence[PreTrainedTokenizerBase | None]" = (), apply_chat_template: bool = False,
             known: Mapping[str, Mapping[str, Any]] | None = None,
             store: Callable[[str, dict[str, Any]], None] = lambda name, answers: None) -> Evaluation:
    """Evaluates models on the same items; differences are the first model minus the second.

    Args:
      reference: whether the tasks and the models are those of `reference_protocol`.
      limit: items per task; None: all.
      tokenizers: of the models, for `apply_chat_template`.
      known, store: answers by the model's name, as `LmEvalAdapter` takes them.

    Raises:
      ConfigError: a model lacks what a task needs.
    """
    names = [model.name for model in eval_models]
    of_reference = [isinstance(task, ReferenceTask) for task in loaded.tasks.values()]
    if any(one != reference for one in of_reference):
        raise ConfigError("the tasks diffullama_... are the protocol reference, and the others are not; evaluate them "
                          "by commands of their own")
    for task in loaded.tasks.values():
        if isinstance(task, ReferenceTask):
            task.eval_models = eval_models
    found, records, shortened = [], [], {}
    # Of the metrics of a multiple choice only exact_match needs is_greedy.
    exact = any(task.OUTPUT_TYPE == "multiple_choice" and "exact_match" in task.aggregation()
                for task in loaded.tasks.values())
    for number, model in enumerate(eval_models):
        adapter = (ReferenceAdapter if reference else LmEvalAdapter)(
            model, num_steps=num_steps, is_greedy=exact or None, judge=judge, seed=seed, progress=True,
            tokenizer=tokenizers[number] if tokenizers else None, known=(known or {}).get(model.name),
            store=lambda answers, name=model.name: store(name, answers))
        found.append(_run(adapter, loaded, limit, apply_chat_template))
        records += _records(model.name, found[-1])
        shortened |= adapter.shortened
    tasks = {name: _summary(name, task, names, found, seed) for name, task in loaded.tasks.items()}
    groups = {group: {name: _group(one.results["groups"][group]) for name, one in zip(names, found, strict=True)}
              for group in found[0].results.get("groups", {})}
    return Evaluation(tasks, groups, records, shortened)


def _run(adapter: LmEvalAdapter, loaded: LoadedTasks, limit: int | None, apply_chat_template: bool) -> _Found:
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)  # noqa: NPY002  # used by tasks of lm-eval
    for task in loaded.tasks.values():
        task.set_fewshot_seed(DEFAULT_OTHER_SEED)
    with quiet():
        results = lm_eval_evaluate(lm=adapter, task_dict=loaded.loaded, limit=limit, bootstrap_iters=_BOOTSTRAPS,
                                   log_samples=True, apply_chat_template=apply_chat_template,
                                   confirm_run_unsafe_code=True)
    values: dict[str, dict] = {name: {} for name in loaded.tasks}
    for name, samples in results["samples"].items():
        for sample in samples:
            for metric in sample["metrics"]:
                values[name].setdefault((metric, sample["filter"]), []).append(_plain(sample[metric]))
    halves = {name: _half_values(adapter, name, task, results["samples"][name]) for name, task in loaded.tasks.items()}
    return _Found(results, values, halves, dict(adapter.costs))


def _half_values(adapter: LmEvalAdapter, name: str, task: Any, samples: Sequence[Record]) -> dict[tuple[str, str], Any]:
    """Returns each metric's values of items by the first and by the second half of the passes, where these differ."""
    if task.OUTPUT_TYPE not in ("multiple_choice", "loglikelihood", "loglikelihood_rolling"):
        return {}
    if adapter.eval_model.autoregressive or not any(first != second for (of, _, _), (first, second)
                                                    in adapter.halves.items() if of == name):
        return {}
    values: dict[tuple[str, str], tuple[list, list]] = {}
    for sample in samples:
        for half in (0, 1):
            answers = []
            for option, response in enumerate(sample["filtered_resps"]):
                score = adapter.halves[name, sample["doc_id"], option][half]
                answers.append(score if task.OUTPUT_TYPE == "loglikelihood_rolling" else (score, response[1]))
            for metric, value in task.process_results(sample["doc"], answers).items():
                values.setdefault((metric, sample["filter"]), ([], []))[half].append(_plain(value))
    return values


def _summary(name: str, task: Any, names: Sequence[str], found: Sequence[_Found], seed: int) -> dict[str, Any]:
    """Returns a task's items, metrics and costs."""
    aggregations, metrics = task.aggregation(), {}
    for key in found[0].values[name]:
        metric, filtered = key
        aggregate = aggregations.get(metric, np.mean)
        columns = [one.values[name][key] for one in found]
        means = {}
        for model, one, column in zip(names, found, columns, strict=True):
            mean = aggregate_of(column, aggregate, seed)
            if key in one.halves[name]:
                error = monte_carlo_error(*one.halves[name][key], aggregate, seed)
                mean = dataclasses.replace(mean, monte_carlo_error=error)
            means[model] = dataclasses.asdict(mean)
        difference = None
        if len(found) > 1 and is_comparable(columns[0]) and is_comparable(columns[1]):
            difference = dataclasses.asdict(paired_difference(columns[0], columns[1], aggregate, seed))
        metrics[metric if filtered == "none" else f"{metric}, {filtered}"] = {"models": means, "difference": difference}
    costs = {}
    for model, one in zip(names, found, strict=True):
        cost = one.costs.get(name, Cost())
        costs[model] = {"seconds": cost.seconds, "tokens": cost.tokens, "passes": cost.passes}
    count = max(len(column) for column in found[0].values[name].values())
    return {"items": count, "metrics": metrics, "costs": costs}


def _records(model: str, found: _Found) -> list[Record]:
    """Returns lm-eval's samples as JSON, with the model and the task."""
    records = [{"task": name, "model": model, "filter": sample["filter"],
                **{key: sample[key] for key in _KEPT},
                "values": {metric: sample[metric] for metric in sample["metrics"]}}
               for name, samples in found.results["samples"].items() for sample in samples]
    return json.loads(json.dumps(records, default=handle_non_serializable))


def _group(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    found = {}
    for key, value in values.items():
        metric, comma, filtered = key.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, (int, float)):
            error = values.get(f"{metric}_stderr,{filtered}")
            name = metric if filtered == "none" else f"{metric}, {filtered}"
            error = float(error) if isinstance(error, float) else None
            found[name] = dataclasses.asdict(Mean(value, error, values["sample_len"]))
    return found


def _plain(value: Any) -> Any:
    """Returns a number of NumPy as Python's."""
    return value.item() if isinstance(value, np.generic) else value


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences lm-eval, except for its progress bars on a terminal."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        if not sys.stderr.isatty():
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        yield
