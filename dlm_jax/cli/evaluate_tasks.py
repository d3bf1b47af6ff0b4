"""`dlm evaluate --tasks`: lm-eval's tasks, with the model and its parent on the same items.

--out=results.json writes results.json; its table in results.md; a page, results.html; and a record an item in
results.items.jsonl. Answers are stored while the command runs, so that a stopped one resumes and asks nothing twice.
"""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from dlm_jax.cli.shared import ResumeState, check_at_least_one, load_model, read_mesh, write_result
from dlm_jax.config_fields import check_at_least
from dlm_jax.errors import ConfigError

if TYPE_CHECKING:
    from dlm_jax.evaluation.eval_model import EvalModel
    from dlm_jax.pipeline import DiffusionLM
    from dlm_jax.sampling import SamplerConfig

PACKAGES = ("dlm-jax", "jax", "jaxlib", "flax", "numpy", "transformers", "tokenizers", "lm-eval")
_DIFFUSION_FLAGS = ("num_steps", "policy", "threshold", "block_length")  # how a diffusion model generates
GENERATION_FLAGS = (*_DIFFUSION_FLAGS, "drafter")
TASK_DEFAULTS = {"data_dir": None, "data_files": None, "include_path": None, "mc_estimator": "mask_count",
                 "limit": None, "parent": None, "judge": None, "num_fewshot": None, "apply_chat_template": False,
                 "allow_code_execution": False, "out": None}
_REFERENCE = "diffullama"  # how the tasks of the paper's scripts, and the tag of all of them, begin
_OLD_CHOICES = {"counts": "mask_count", "times": "time"}
_SETTINGS = ("model", "parent", "objective", "mask_token", "dtype", "tasks", "include_path", "limit", "num_fewshot",
             "num_masks", "mc_estimator", "apply_chat_template", "judge", "seed", *GENERATION_FLAGS)


def add_task_arguments(parser: argparse._ArgumentGroup) -> None:
    parser.add_argument("--tasks", metavar="NAME,...", help="tasks, groups and tags of lm-eval, and those listed above")
    parser.add_argument("--data_dir", metavar="DIR", help="folder with NAME.jsonl, or with NAME/ and a test file in it "
                        "(default: the tasks' datasets on the Hugging Face hub)")
    parser.add_argument("--data_files", nargs="+", action="extend", metavar="NAME=FILE", help="the file of a task: "
                        ".jsonl, .json (also .gz), .parquet, .arrow, .csv, .txt, or hf:NAME?name=&split=")
    parser.add_argument("--include_path", metavar="DIR", help="folder with tasks of your own, as lm-eval's YAML files")
    parser.add_argument("--mc_estimator", type=_current_name, choices=("mask_count", "time"), help="how the bound is "
                        "estimated: by the number of masked tokens, where each token counts about equally, or by "
                        "stratified times with weights 1 / t (default mask_count)")
    parser.add_argument("--limit", type=int, help="items per task (default: all)")
    parser.add_argument("--parent", metavar="MODEL", help="an autoregressive model, evaluated on the same items")
    parser.add_argument("--judge", metavar="MODEL", help="an autoregressive model that computes the perplexity of "
                        "generated texts (default: the parent)")
    parser.add_argument("--num_fewshot", type=int, help="examples before each prompt (default: as the task says), from "
                        "the task's training file if its data is in --data_dir")
    parser.add_argument("--apply_chat_template", action="store_true", default=None, help="write prompts as messages, "
                        "with the tokenizer's chat template")
    parser.add_argument("--allow_code_execution", action="store_true", default=None, help="run generated programs "
                        "under bubblewrap; without it tasks of programs are refused")
    parser.add_argument("--out", metavar="FILE.json", help="file for results; a stopped command resumes")


def add_generation_arguments(parser: argparse._ArgumentGroup) -> None:
    parser.add_argument("--num_steps", type=int, help="forward passes per generated text (default: the model's own, or "
                        "64; for the policy threshold as many as needed, and at most one per token)")
    parser.add_argument("--policy", help="which tokens are revealed first, a policy of `dlm sample` "
                        "(default: the model's own, as there)")
    parser.add_argument("--threshold", type=float, help="the probability at which the policy threshold reveals "
                        "(default 0.9)")
    parser.add_argument("--block_length", type=int, help="generate blocks of this many tokens from left to right")
    parser.add_argument("--drafter", help="what guesses the next tokens of an autoregressive model, as for `dlm "
                        "sample`: its texts stay the same")


def run_tasks(arguments: argparse.Namespace) -> None:
    names = _check(arguments)
    reference = all(name.startswith(_REFERENCE) for name in names)
    if arguments.num_masks is None:
        arguments.num_masks = 32 if reference else 16
    files = dict(_named_file(text) for text in arguments.data_files or ())
    from dlm_jax.evaluation import lm_eval  # noqa: F401  # raises ConfigError without lm-eval, in one sentence
    from dlm_jax.evaluation.code_eval import Sandbox
    from dlm_jax.evaluation.own_tasks import OpenEndedTask
    from dlm_jax.evaluation.run import evaluate, quiet
    from dlm_jax.evaluation.task_loading import load_tasks

    sandbox = Sandbox() if arguments.allow_code_execution else None
    with quiet():
        tasks = load_tasks(names, data_dir=arguments.data_dir, data_files=files, include_path=arguments.include_path,
                           num_fewshot=arguments.num_fewshot, sandbox=sandbox)
    generates = any(getattr(task, "generates", task.OUTPUT_TYPE == "generate_until") for task in tasks.tasks.values())
    judged = [name for name, task in tasks.tasks.items() if isinstance(task, OpenEndedTask)]
    _check_tasks(arguments, generates, judged)
    models, sampler = _load_eval_models(arguments, reference)
    judge = models[1][0] if judged and arguments.judge is None else None
    if arguments.judge is not None:
        judge, _ = _load_autoregressive(arguments, arguments.judge, arguments.judge, batch_size=arguments.batch_size)
    settings = {name: getattr(arguments, name) for name in _SETTINGS} | {
        "data": tasks.files, "sampler": dataclasses.asdict(sampler)}
    with _answers_file(arguments.out, json.loads(json.dumps(settings))) as (known, store):
        found = evaluate(tasks, [model for model, _ in models], reference=reference, limit=arguments.limit,
                         num_steps=arguments.num_steps, judge=judge, seed=arguments.seed,
                         tokenizers=[lm.tokenizer for _, lm in models],
                         apply_chat_template=arguments.apply_chat_template, known=known, store=store)
        result = {"models": [model.name for model, _ in models], "settings": settings,
                  "versions": {name: importlib.metadata.version(name) for name in PACKAGES}, "tasks": found.tasks,
                  "groups": found.groups, "shortened": found.shortened}
        _write(arguments, result, found.records)


def _write(arguments: argparse.Namespace, result: dict[str, Any], records: list[dict[str, Any]]) -> None:
    from dlm_jax.evaluation.report import markdown_report, page, table
    from dlm_jax.storage import write_json

    if arguments.out:
        out = pathlib.Path(arguments.out)
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        for suffix, content in ((".items.jsonl", lines), (".md", markdown_report(result)),
                                (".html", page(result, records))):
            out.with_suffix(suffix).write_text(content, encoding="utf-8")
        write_json(out, result)
    write_result(arguments.json, result, table(result))


def sampler_of(arguments: argparse.Namespace, autoregressive: bool = False,
               defaults: Mapping[str, Any] = MappingProxyType({})) -> "SamplerConfig":
    """Returns the sampler of the flags, at temperature 0.

    Args:
      defaults: a diffusion model's own settings, as `DiffusionLM.default_sampling`.

    Raises:
      ConfigError: a value is wrong, or a flag is given for an autoregressive model.
    """
    from dlm_jax.sampling import SamplerConfig, resolve_settings

    if autoregressive:
        for name in _DIFFUSION_FLAGS:
            if getattr(arguments, name) is not None:
                raise ConfigError(f"--{name} is for diffusion models, and this one is evaluated as autoregressive; "
                                  "leave it out")
        return SamplerConfig("autoregressive", temperature=0.0, drafter=arguments.drafter or "none")
    if arguments.drafter is not None:
        raise ConfigError("--drafter is for models that generate from left to right; use --objective=autoregressive, "
                          "or leave it out")
    if arguments.policy == "autoregressive":
        raise ConfigError("--policy=autoregressive is not for diffusion models; use "
                          "--objective=autoregressive")
    if defaults.get("policy") == "autoregressive":  # such as a model that drafts for itself
        defaults = {}
    return resolve_settings({name: getattr(arguments, name) for name in _DIFFUSION_FLAGS} | {"temperature": 0.0},
                            defaults)


def _check(arguments: argparse.Namespace) -> list[str]:
    """Checks the arguments before anything is loaded; returns the tasks' names."""
    check_at_least_one(arguments, "limit", "num_steps", "num_masks", "batch_size")
    if arguments.num_fewshot is not None:
        check_at_least(arguments.num_fewshot, 0, "--num_fewshot")
    names = arguments.tasks.split(",")
    if len(set(names)) < len(names):
        raise ConfigError(f"--tasks={arguments.tasks} names a task twice")
    reference = [name.startswith(_REFERENCE) for name in names]
    if any(reference) and not all(reference):
        raise ConfigError(f"--tasks={arguments.tasks}: the tasks {_REFERENCE}_... follow the paper's scripts, and the "
                          "others do not; evaluate them by commands of their own")
    if all(reference):
        given = [name for name in (*GENERATION_FLAGS, "num_fewshot", "apply_chat_template") if getattr(arguments, name)]
        given += ["mc_estimator"] if arguments.mc_estimator != "mask_count" else []
        if given:
            raise ConfigError(f"the tasks {_REFERENCE}_... have their own generation and score, and no examples; leave "
                              f"--{given[0]} out")
    sampler_of(arguments, arguments.objective == "autoregressive")
    if arguments.out and pathlib.Path(arguments.out).suffix != ".json":
        raise ConfigError(f"--out={arguments.out} must end in .json; all results go beside it")
    return names


def _check_tasks(arguments: argparse.Namespace, generates: bool, judged: list[str]) -> None:
    for name in GENERATION_FLAGS:
        if getattr(arguments, name) is not None and not generates:
            raise ConfigError(f"--{name} is for generated texts, and --tasks={arguments.tasks} generates none; leave "
                              "it out")
    if judged and arguments.judge is None and arguments.parent is None:
        raise ConfigError(f"the task {judged[0]} needs a model that judges generated texts; name it with --judge, or a "
                          "--parent")
    if arguments.judge is not None and not judged:
        raise ConfigError(f"--judge is for the task generation, which is not among --tasks={arguments.tasks}; leave it "
                          "out")


def _load_eval_models(arguments: argparse.Namespace,
                      reference: bool) -> "tuple[list[tuple[EvalModel, DiffusionLM]], SamplerConfig]":
    """Returns the model, and its parent if there is one; and how the model generates."""
    from dlm_jax.evaluation.make_eval_model import make_eval_model

    options = {"reference": reference, "mc_estimator": arguments.mc_estimator, "num_samples": arguments.num_masks,
               "seed": arguments.seed, "batch_size": arguments.batch_size}
    lm = load_model(arguments)
    autoregressive = arguments.objective == "autoregressive" or lm.pretrained.is_autoregressive
    sampler = sampler_of(arguments, autoregressive, {} if reference else lm.default_sampling)
    model = make_eval_model(lm.pretrained, str(arguments.model), mesh=lm.mesh, **options, sampler=sampler,
                            autoregressive=autoregressive, network=lm.model_with_drafter(sampler.drafter))
    models = [(model, lm)]
    if arguments.parent is not None:
        models.append(_load_autoregressive(arguments, arguments.parent, f"{arguments.parent} (parent)", **options))
    return models, sampler


def _load_autoregressive(arguments: argparse.Namespace, source: str, name: str,
                         **options: Any) -> "tuple[EvalModel, DiffusionLM]":
    """Returns the parent or the judge, on the mesh of the flags."""
    from dlm_jax.evaluation.make_eval_model import make_eval_model
    from dlm_jax.pipeline import DiffusionLM

    mesh = None if arguments.mesh is None else read_mesh(arguments.mesh)
    lm = DiffusionLM.from_pretrained(source, dtype=arguments.dtype, mesh=mesh)
    return make_eval_model(lm.pretrained, name, autoregressive=True, mesh=lm.mesh, **options), lm


@contextlib.contextmanager
def _answers_file(out: str | None, settings: dict[str, Any]) -> Iterator[tuple[dict, Callable]]:
    """Yields the answers of a stopped run, by model, and a function that stores new ones; removes them at the end."""
    if out is None:
        yield {}, lambda name, answers: None
        return
    path = pathlib.Path(out).with_suffix(".answers.jsonl")
    with ResumeState(str(path), settings) as partial:
        known: dict[str, dict[str, Any]] = {}
        for line in pathlib.Path(f"{path}.partial").read_text(encoding="utf-8").split("\n")[: partial.done]:
            record = json.loads(line)
            known.setdefault(record["model"], {}).update(record["answers"])

        def store(name: str, answers: dict[str, Any]) -> None:
            if answers:
                partial.add([{"model": name, "answers": answers}])

        yield known, store
        partial.remove()


def _current_name(value: str) -> str:
    """Returns a choice; refuses a former one and names its successor."""
    if value in _OLD_CHOICES:
        raise argparse.ArgumentTypeError(f"{value} is now {_OLD_CHOICES[value]}; write that instead")
    return value


def _named_file(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if not equals or not path:
        raise ConfigError(f"--data_files {text}: write TASK=FILE")
    return name, path
