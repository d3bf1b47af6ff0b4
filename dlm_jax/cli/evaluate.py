"""Evaluates a model: on tasks, next to its parent, or by the likelihood of held-out text in nats per token.

For a diffusion model likelihoods are bounds, estimated from random masks; for an autoregressive model they are exact.

  dlm evaluate --model=runs/first --tasks=hellaswag,lambada --data_dir=tasks --parent=gpt2 --out=results.json
  dlm evaluate --model=runs/first --tasks=gsm8k --data_files gsm8k=test.jsonl --shots=4 --limit=100
  dlm evaluate --model=runs/first --data heldout.jsonl --json=bound.json
  dlm evaluate --model=gpt2 --data heldout.jsonl --objective=autoregressive
  dlm evaluate --model=runs/gsm8k --examples test.txt --json=answers.json
  dlm evaluate --model=runs/first --lm_eval=lambada_openai,arc_easy --parent=gpt2

Tasks: hellaswag, winogrande, piqa, siqa, lambada, triviaqa, squad, gsm8k, gsm8k_cot, gsm8k_icot, mawps, mawps_cot,
satmath, satmath_cot, rocstories, humaneval_infilling (it runs programs: --allow_code_execution), text,
reconstruction, generation. --lm_eval runs the tasks of lm-eval, the LM Evaluation Harness, with its
prompts and metrics.
"""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import io
import json
import logging
import math
import pathlib
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from dlm_jax.cli.evaluate_tasks import (
    GENERATION_FLAGS,
    PACKAGES,
    add_generation_arguments,
    add_task_arguments,
    check_shared,
    check_used,
    load_eval_models,
    run_tasks,
    sampler_of,
)
from dlm_jax.cli.shared import add_json_argument, add_model_arguments, check_at_least_one, load_model, write_result
from dlm_jax.errors import ConfigError, DataError, did_you_mean

if TYPE_CHECKING:
    from dlm_jax.data.config import DataConfig
    from dlm_jax.data.rows import RowSource
    from dlm_jax.diffusion import Batch
    from dlm_jax.pipeline import DiffusionLM

FLAGS = {"mask_token=": "--mask_token", "data.train": "--data", "data.length": "--length",
         "data.text_key": "--text_key", "data.document_separator": "--document_separator"}
# The flags of each mode, besides those of all modes, with their defaults. The parser's own default is None.
_GENERATION = dict.fromkeys(GENERATION_FLAGS)
_TASKS = {"limit": None, "parent": None, "shots": None, "out": None} | _GENERATION
_OWN = {"tasks": {"data_dir": None, "data_files": None, "protocol": "default", "mc_estimator": "mask_count",
                  "prompt_file": None, "samples": 1, "temperature": None, "judge": None,
                  "allow_code_execution": False} | _TASKS,
        "data": {"num_rows": 256, "length": None, "document_separator": "", "text_key": "text"},
        "examples": {"limit": None} | _GENERATION,
        "lm_eval": {"lm_eval_dir": None} | _TASKS}
_BOOTSTRAPS = 1000  # for the errors of perplexities; lm-eval's 100000 take minutes
_LM_EVAL_SETTINGS = ("model", "parent", "objective", "mask_token", "dtype", "lm_eval", "lm_eval_dir", "limit", "shots",
             "num_masks", "seed", *GENERATION_FLAGS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--objective", choices=("diffusion", "autoregressive"), default="diffusion",
                        help="what the model is evaluated as (default %(default)s)")
    parser.add_argument("--num_masks", type=int, help="random masks per row or option (default 16; under the protocol "
                        "reference 32, its T)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default %(default)s)")
    parser.add_argument("--batch_size", type=int, default=16, help="rows per batch (default %(default)s)")
    add_json_argument(parser)
    add_task_arguments(parser.add_argument_group("tasks"))
    _add_text_arguments(parser.add_argument_group("held-out text"))
    _add_examples_arguments(parser.add_argument_group("fine-tuning examples"))
    _add_lm_eval_arguments(parser.add_argument_group("lm-eval"))
    add_generation_arguments(parser.add_argument_group("generation: tasks, examples, lm-eval"))


def run(arguments: argparse.Namespace) -> None:
    given = [name for name in _MODES if getattr(arguments, name) is not None]
    if len(given) != 1:
        raise ConfigError("name what to evaluate on: --tasks=NAME,..., --data FILE, --examples FILE or "
                          "--lm_eval=TASK,..., exactly one of them")
    mode, = given
    for other in _OWN:
        for name in _OWN[other]:
            if name not in _OWN[mode] and getattr(arguments, name) is not None:
                owners = " or ".join(f"--{owner}" for owner in _OWN if name in _OWN[owner])
                raise ConfigError(f"--{name} belongs to {owners}, which is not given; leave it out")
    for name, default in _OWN[mode].items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, default)
    _MODES[mode](arguments)


def _add_text_arguments(parser: argparse._ArgumentGroup) -> None:
    parser.add_argument("--data", nargs="+", action="extend", metavar="FILE",
                        help="files, globs, a directory made by `dlm prepare`, tfds:NAME, hf:NAME")
    parser.add_argument("--num_rows", type=int, help="number of rows (default 256)")
    parser.add_argument("--length", type=int, help="tokens per row (default: the model's maximum, at most 512)")
    parser.add_argument("--document_separator", help="separator of the documents of a .txt file")
    parser.add_argument("--text_key", help="the key of the text in JSON (default text)")


def _run_text(arguments: argparse.Namespace) -> None:
    from dlm_jax.data.config import DataConfig
    from dlm_jax.data.loader import Loader

    check_at_least_one(arguments, "num_rows")
    lm = load_model(arguments)
    length = arguments.length or min(lm.config.max_length, 512)
    if length > lm.config.max_length:
        raise ConfigError(f"--length={length} is more than the {lm.config.max_length} tokens the model takes")
    data = DataConfig(train=tuple(arguments.data), validation_fraction=0.0, length=length,
                      text_key=arguments.text_key, document_separator=arguments.document_separator)
    with _open_rows(lm, data) as rows:
        batch = Loader([rows], min(len(rows), arguments.num_rows), shuffle=False).batch(0)
    likelihood = _likelihood(lm, batch, arguments, autoregressive=arguments.objective == "autoregressive")
    result = {"model": lm.pretrained.source, "objective": arguments.objective, "data": arguments.data,
              "num_rows": len(batch.tokens), "length": length, **likelihood,
              "perplexity": math.exp(likelihood["nats_per_token"])}
    if arguments.objective == "diffusion":
        result |= {"num_masks": arguments.num_masks or 16, "seed": arguments.seed}
    at_most = _at_most(result)
    error = f" +- {result['standard_error']:.4f}" if at_most else ""
    write_result(arguments.json, result, _aligned({
        "model": f"{result['model']}, {result['objective']}",
        "text": f"{result['num_tokens']} tokens in {result['num_rows']} rows of {result['length']}",
        "nats per token": f"{at_most}{result['nats_per_token']:.4f}{error}",
        "perplexity": f"{at_most}{result['perplexity']:.2f}"}))


@contextlib.contextmanager
def _open_rows(lm: "DiffusionLM", data: "DataConfig") -> "Iterator[RowSource]":
    """Yields the rows of the data; of prepared rows the held-out ones, if there are any."""
    from dlm_jax.data.corpus import load_rows

    with tempfile.TemporaryDirectory() as folder:
        (rows,), held_out = load_rows(data, lm.tokenizer, vocab_size=lm.config.vocab_size, cache_dir=folder)
        yield rows if held_out is None else held_out


def _likelihood(lm: "DiffusionLM", batch: "Batch", arguments: argparse.Namespace, *,
                autoregressive: bool) -> dict[str, Any]:
    """Returns the number of tokens, the nats per token (exact, or the bound) and their standard error."""
    from dlm_jax.evaluation import autoregressive_nll, bound

    settings = {"segment_ids": batch.segment_ids, "batch_size": arguments.batch_size}
    if autoregressive:
        estimate = autoregressive_nll(lm.model, batch.tokens, batch.noisable_mask, **settings)
    else:
        num_masks = 16 if arguments.num_masks is None else arguments.num_masks
        estimate = bound(lm.model, batch.tokens, batch.noisable_mask, diffusion=lm.diffusion, num_samples=num_masks,
                         seed=arguments.seed, **settings)
    return {name: getattr(estimate, name) for name in ("num_tokens", "nats_per_token", "standard_error")}


def _at_most(result: dict[str, Any]) -> str:
    return "at most " if result["objective"] == "diffusion" else ""


def _aligned(lines: dict[str, str]) -> str:
    return "\n".join(f"{name:<16}{value}" for name, value in lines.items())


def _add_examples_arguments(parser: argparse._ArgumentGroup) -> None:
    parser.add_argument("--examples", nargs="+", action="extend", metavar="FILE",
                        help="files, globs, a directory made by `dlm prepare`, tfds:NAME, hf:NAME; --limit "
                        "and --num_masks hold here too")


def _run_examples(arguments: argparse.Namespace) -> None:
    from dlm_jax.data.config import DataConfig
    from dlm_jax.data.loader import Loader
    from dlm_jax.evaluation.generation_eval import answer, judge, questions_of
    from dlm_jax.evaluation.report import mean_of

    check_at_least_one(arguments, "limit", "num_steps", "num_masks")
    lm = load_model(arguments)
    recipe = lm.pretrained.recipe or {}
    if recipe.get("data.examples.format", "none") == "none":
        raise ConfigError(f"{arguments.model} has not been fine-tuned on examples, so their prompt format is unknown; "
                          "evaluate it with --tasks or --data")
    autoregressive = arguments.objective == "autoregressive" or lm.pretrained.is_autoregressive
    sampler = sampler_of(arguments, autoregressive)
    prompt_format = dataclasses.replace(lm.prompt_format(), length=recipe["data.length"])
    data = DataConfig(train=tuple(arguments.examples), validation_fraction=0.0, length=prompt_format.length,
                      examples=prompt_format.config)
    with _open_rows(lm, data) as source:
        number = min(len(source), arguments.limit or len(source))
        rows, batch = source[slice(0, number)], Loader([source], number, shuffle=False).batch(0)
    likelihood = _likelihood(lm, batch, arguments, autoregressive=autoregressive)
    questions = questions_of(rows, prompt_format)
    texts = answer(lm.model, questions, prompt_format, sampler, diffusion=lm.diffusion, seed=arguments.seed,
                   batch_size=arguments.batch_size, mesh=lm.mesh, progress=True)
    values = judge(texts, questions, prompt_format)
    records = [{"prompt": lm.tokenizer.decode(question.prompt, skip_special_tokens=True), "answer": question.answer,
                "text": text, "values": value}
               for question, text, value in zip(questions, texts, values, strict=True)]
    means = {name: mean_of([value[name] for value in values]) for name in values[0]}
    result = {"model": lm.pretrained.source, "objective": "autoregressive" if autoregressive else "diffusion",
              "examples": arguments.examples, "num_examples": number, "length": prompt_format.length,
              "policy": sampler.policy, "num_steps": sampler.steps, "threshold": sampler.reveal_threshold,
              "block_length": sampler.block_length, **likelihood,
              "values": {name: dataclasses.asdict(mean) for name, mean in means.items()}}
    shown = {name: f"{mean.mean:.3f}" + ("" if mean.standard_error is None else f" +- {mean.standard_error:.3f}")
             for name, mean in means.items()}
    write_result(arguments.json, {**result, "records": records}, _aligned({
        "model": f"{result['model']}, {result['objective']}",
        "examples": f"{number}, in rows of {prompt_format.length}",
        "nats per token": f"{_at_most(result)}{result['nats_per_token']:.4f}", **shown}))


def _add_lm_eval_arguments(parser: argparse._ArgumentGroup) -> None:
    parser.add_argument("--lm_eval", metavar="TASK,...", help="tasks, groups and tags of lm-eval; --limit, --shots, "
                        "--parent and --out are as for --tasks")
    parser.add_argument("--lm_eval_dir", metavar="DIR", help="holds tasks of your own, as YAML files; their relative "
                        "data_files are found from the current folder")


def _run_lm_eval(arguments: argparse.Namespace) -> None:
    names = _check_lm_eval(arguments)
    from dlm_jax.evaluation.lm_eval import LmEvalAdapter  # raises ConfigError without lm-eval
    from dlm_jax.storage import write_json

    if arguments.num_masks is None:
        arguments.num_masks = 16
    with _quiet():
        tasks = _load_tasks(names, arguments.lm_eval_dir)
    generates = any(task.OUTPUT_TYPE == "generate_until" for task in tasks["tasks"].values())
    check_used(arguments, generates, f"--lm_eval={arguments.lm_eval}")
    _set_shots(tasks["tasks"], arguments.shots)
    found, shortened = {}, {}
    for eval_model in load_eval_models(arguments):
        # Of the metrics of a multiple choice only exact_match needs is_greedy.
        exact = any(task.OUTPUT_TYPE == "multiple_choice" and "exact_match" in task.aggregation()
                    for task in tasks["tasks"].values())
        lm = LmEvalAdapter(eval_model, num_steps=arguments.num_steps, is_greedy=exact or None)
        with _quiet():
            found[eval_model.name] = _evaluate(lm, tasks, arguments.limit, samples=arguments.out is not None)
        shortened |= lm.shortened
    result = {"models": list(found), "settings": {name: getattr(arguments, name) for name in _LM_EVAL_SETTINGS},
              "versions": {name: importlib.metadata.version(name) for name in (*PACKAGES, "lm-eval")},
              "shortened": shortened, "lm_eval": found}
    if arguments.out:
        write_json(pathlib.Path(arguments.out), result)
    for one in found.values():
        one.pop("samples", None)
    write_result(arguments.json, result, _lm_eval_table(result, arguments.objective))


def _check_lm_eval(arguments: argparse.Namespace) -> list[str]:
    """Checks the arguments before anything is loaded; returns the tasks' names."""
    check_shared(arguments, "lm_eval")
    folder = arguments.lm_eval_dir
    if folder is not None and not pathlib.Path(folder).is_dir():
        raise ConfigError(f"there is no folder {folder}; name the one that holds your tasks' YAML files with "
                          "--lm_eval_dir")
    return arguments.lm_eval.split(",")


def _load_tasks(names: Sequence[str], folder: str | None) -> dict[str, Any]:
    """Loads lm-eval's tasks and groups with their data."""
    import datasets
    from lm_eval.tasks import TaskManager

    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # do not report local files to the hub
    manager = None if folder is None else TaskManager(include_path=folder, include_defaults=False)
    if manager is None or not set(names) <= set(manager.all_subtasks):  # the default tasks are thousands of files
        manager = TaskManager(include_path=folder)
    for name in names:
        if name not in manager.all_tasks:
            where = "" if folder is None else f", nor is there a valid YAML file of it in {folder}"
            raise ConfigError(f"lm-eval has no task {name!r}{did_you_mean(name, manager.all_tasks)}{where}; "
                              "`lm_eval ls tasks` lists them, and --lm_eval_dir names a folder with your own")
    try:
        loaded = manager.load(list(names))
    except Exception as error:  # of the hub, the network, a task's files or its code
        raise DataError(f"--lm_eval={','.join(names)} cannot be loaded: {type(error).__name__}: "
                        f"{' '.join(str(error).split())}") from error
    for name, task in loaded["tasks"].items():
        for flag, does in (("UNSAFE_CODE", "runs code that the model writes"), ("MULTIMODAL", "is not text only")):
            if getattr(task, flag, False):
                raise ConfigError(f"the task {name} {does}, which is not supported; leave it out")
    return loaded


def _set_shots(tasks: dict[str, Any], shots: int | None) -> None:
    """Sets the number of examples as lm-eval does, but raises ConfigError where it would ignore `shots`."""
    for name, task in tasks.items():
        own = task.get_config("num_fewshot")
        if shots and own == 0:
            raise ConfigError(f"--shots={shots}: the task {name} is defined without examples; leave --shots or the "
                              "task out")
        if shots:
            _check_examples(name, task, shots)
        task.set_config(key="num_fewshot", value=(own or 0) if shots is None else shots)


def _check_examples(name: str, task: Any, shots: int) -> None:
    """Checks that there are enough examples, and that no document is its own (lm-eval checks the test split only)."""
    split, tested = task.fewshot_cfg.split, task.get_config("test_split")
    apart = (task.has_training_docs() or task.fewshot_cfg.samples is not None if split is None
             else tested is not None or split != task.get_config("validation_split"))
    if not apart:
        raise ConfigError(f"--shots={shots}: the task {name} takes its examples from the documents that it tests, so "
                          "a document may be its own example; name another fewshot_split in its YAML file, or leave "
                          "--shots out")
    available = len(list(task.fewshot_docs())) - (split is not None and split == tested)
    if shots > available:
        raise ConfigError(f"--shots={shots}, and the task {name} has {available} examples; ask for fewer")


def _evaluate(lm: Any, tasks: dict[str, Any], limit: int | None, *, samples: bool) -> dict[str, Any]:
    """Runs lm-eval; returns its results as JSON values."""
    import numpy as np
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
    from lm_eval.evaluator import evaluate
    from lm_eval.utils import handle_non_serializable

    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)  # noqa: NPY002  # used by tasks of lm-eval
    for task in tasks["tasks"].values():
        task.set_fewshot_seed(DEFAULT_OTHER_SEED)
    results = evaluate(lm=lm, task_dict=tasks, limit=limit, bootstrap_iters=_BOOTSTRAPS, log_samples=samples)
    return json.loads(json.dumps(results, default=handle_non_serializable))


def _lm_eval_table(result: dict[str, Any], objective: str) -> str:
    from lm_eval.utils import make_table

    lines = []
    for model, found in result["lm_eval"].items():
        lines += [model, "", make_table(found).strip(), ""]
        lines += [make_table(found, "groups").strip(), ""] if "groups" in found else []
    if objective == "diffusion":
        lines.append(f"Likelihoods of {result['models'][0]} are bounds: its perplexities are at most these.")
    lines += [f"{task} asks for texts of {requested} tokens; {generated} are generated, half of a row."
              for task, (requested, generated) in result["shortened"].items()]
    return "\n".join(lines).strip()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences lm-eval, except for its progress bars on a terminal."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        if not sys.stderr.isatty():
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        yield


_MODES = {"tasks": run_tasks, "data": _run_text, "examples": _run_examples, "lm_eval": _run_lm_eval}
