"""`dlm evaluate --tasks`: tasks from local files or the hub, with the model and its parent on the same items.

--out=results.json writes three files: results.json; its table in results.md; and one record per item in
results.items.jsonl, which grows during the run. A stopped command resumes from it.
"""

import argparse
import contextlib
import importlib.metadata
import json
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dlm_jax.cli.paths import check_output
from dlm_jax.cli.shared import ResumeState, check_at_least_one, load_model, read_mesh, write_result
from dlm_jax.config_fields import check_at_least
from dlm_jax.errors import ConfigError

if TYPE_CHECKING:
    from dlm_jax.evaluation.eval_model import EvalModel
    from dlm_jax.evaluation.run import Job
    from dlm_jax.evaluation.tasks import Task
    from dlm_jax.sampling import SamplerConfig

PACKAGES = ("dlm-jax", "jax", "jaxlib", "flax", "numpy", "transformers", "tokenizers")
GENERATION_FLAGS = ("num_steps", "policy", "threshold", "block_length")  # how a diffusion model generates
_OLD_CHOICES = {"release": "reference", "counts": "mask_count", "times": "time"}


def add_task_arguments(parser: argparse._ArgumentGroup) -> None:
    parser.add_argument("--tasks", metavar="NAME,...", help="names of tasks, as listed above")
    parser.add_argument("--data_dir", metavar="DIR", help="folder with NAME.jsonl, or with NAME/ and a test file in it "
                        "(default: the tasks' datasets on the Hugging Face hub)")
    parser.add_argument("--data_files", nargs="+", action="extend", metavar="NAME=FILE", help="the file of a task: "
                        ".jsonl, .json (also .gz), .parquet, .arrow, .csv, .txt, or hf:NAME?name=&split=")
    parser.add_argument("--protocol", type=_current_name, choices=("default", "reference"), help="default: unbiased "
                        "estimates; reference: as the DiffuLLaMA reference implementation, including its quirks")
    parser.add_argument("--mc_estimator", type=_current_name, choices=("mask_count", "time"), help="how the bound is "
                        "estimated: by the number of masked tokens, where each token counts about equally, or by "
                        "stratified times with weights 1 / t (default mask_count)")
    parser.add_argument("--limit", type=int, help="items per task (default: all)")
    parser.add_argument("--parent", metavar="MODEL", help="an autoregressive model, evaluated on the same items")
    parser.add_argument("--judge", metavar="MODEL", help="an autoregressive model that computes the perplexity of "
                        "generated texts (default: the parent)")
    parser.add_argument("--shots", type=int, help="examples before each prompt, the first of the task's training file "
                        "in --data_dir (default 0)")
    parser.add_argument("--prompt_file", metavar="FILE", help="a text to put before each prompt, for instance examples "
                        "with their reasoning; a blank line follows it")
    parser.add_argument("--samples", type=int, help="generated texts per item, which are averaged and vote on an "
                        "answer (default 1)")
    parser.add_argument("--temperature", type=float, help="sampling temperature (default 0, the most likely tokens; "
                        "for generation 1); several samples need one above 0")
    parser.add_argument("--allow_code_execution", action="store_true", default=None, help="run generated programs in "
                        "a sandbox; without it tasks of programs are refused")
    parser.add_argument("--out", metavar="FILE.json", help="file for results; a stopped command resumes")


def _current_name(value: str) -> str:
    """Returns a choice; refuses a former one and names its successor."""
    if value in _OLD_CHOICES:
        raise argparse.ArgumentTypeError(f"{value} is now {_OLD_CHOICES[value]}; write that instead")
    return value


def run_tasks(arguments: argparse.Namespace) -> None:
    from dlm_jax.evaluation.code_execution import Sandbox
    from dlm_jax.evaluation.report import markdown_report, summarize, table
    from dlm_jax.evaluation.run import run
    from dlm_jax.evaluation.tasks import find_task
    from dlm_jax.storage import write_json

    _check(arguments)
    reference = arguments.protocol == "reference"
    if arguments.num_masks is None:
        arguments.num_masks = 32 if reference else 16
    names = arguments.tasks.split(",")
    tasks = [find_task(name) for name in names]
    _check_tasks(tasks, arguments)
    text, about_text = read_prompt_file(arguments.prompt_file)
    jobs, files = zip(*(make_job(task, arguments, reference, text) for task in tasks), strict=True)
    execute = Sandbox() if any(task.executes for task in tasks) else None
    eval_models = load_eval_models(arguments, reference, arguments.mc_estimator)
    judge = None
    if any(task.kind == "open_ended" for task in tasks):
        judge = eval_models[1] if arguments.judge is None else _load_autoregressive(
            arguments, arguments.judge, arguments.judge, batch_size=arguments.batch_size)
    models = [eval_model.name for eval_model in eval_models]
    settings = {name: getattr(arguments, name) for name in (
        "model", "parent", "objective", "mask_token", "dtype", "protocol", "limit", "shots", "num_masks",
        "mc_estimator", "samples", "temperature", "judge", "seed", *GENERATION_FLAGS)} | about_text | {"data": files}
    with _records_file(arguments.out, json.loads(json.dumps(settings))) as (done, add):
        records = run(jobs, eval_models, reference=reference, num_steps=arguments.num_steps,
                      samples=arguments.samples, temperature=arguments.temperature, execute=execute, judge=judge,
                      seed=arguments.seed, done=done, add=add)
    result = {"models": models, "settings": settings,
              "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
              "tasks": summarize(records, names, models, arguments.seed)}
    if arguments.out:
        out = pathlib.Path(arguments.out)
        write_json(out, {**result, "records": records})
        out.with_suffix(".md").write_text(markdown_report(result), encoding="utf-8")
    write_result(arguments.json, result, table(result["tasks"], models))


def _check(arguments: argparse.Namespace) -> None:
    """Checks the arguments before a model is loaded."""
    check_shared(arguments, "tasks")
    if arguments.protocol == "reference":
        given = [name for name in (*GENERATION_FLAGS, "shots", "prompt_file") if getattr(arguments, name)]
        given += ["mc_estimator"] if arguments.mc_estimator != "mask_count" else []
        if given:
            raise ConfigError(f"the protocol reference has its own generation and score, and no examples; leave "
                              f"--{given[0]} out, or choose --protocol=default")
    if arguments.shots and arguments.prompt_file:
        raise ConfigError("--shots and --prompt_file both put text before a prompt; leave one of them out")
    if arguments.out:
        check_output(str(_items_path(arguments.out)))


def check_shared(arguments: argparse.Namespace, mode: str) -> None:
    """Checks what `--tasks` and `--lm_eval`, the `mode`, have in common."""
    check_at_least_one(arguments, "limit", "num_steps", "num_masks", "samples", "batch_size")
    if arguments.shots is not None:
        check_at_least(arguments.shots, 0, "--shots")
    names = getattr(arguments, mode).split(",")
    if len(set(names)) < len(names):
        raise ConfigError(f"--{mode}={getattr(arguments, mode)} names a task twice")
    if arguments.out and pathlib.Path(arguments.out).suffix != ".json":
        raise ConfigError(f"--out={arguments.out} must end in .json; all results go beside it")


def _check_tasks(tasks: "Sequence[Task]", arguments: argparse.Namespace) -> None:
    """Checks the settings against each task."""
    from dlm_jax.evaluation.run import Setting, check, generates

    setting = Setting(arguments.protocol == "reference", arguments.num_steps, arguments.samples, arguments.temperature)
    check_used(arguments, any(generates(task) for task in tasks), f"--tasks={arguments.tasks}")
    for task in tasks:
        check(task, setting)
        if task.kind in ("text", "reconstruct") and (arguments.shots or arguments.prompt_file):
            raise ConfigError(f"the task {task.name} has no prompts; leave --shots and --prompt_file out")
        if task.kind == "open_ended" and arguments.judge is None and arguments.parent is None:
            raise ConfigError(f"the task {task.name} needs a model that judges generated texts; name it with --judge, "
                              "or a --parent")
        if task.executes and not arguments.allow_code_execution:
            raise ConfigError(f"the task {task.name} runs generated programs; allow it with "
                              "--allow_code_execution, and read in docs/guides/evaluate.md how they are isolated")


def load_eval_models(arguments: argparse.Namespace, reference: bool = False,
                     estimator: str = "mask_count") -> "list[EvalModel]":
    """Returns the model, and its parent if there is one."""
    from dlm_jax.evaluation.make_eval_model import make_eval_model

    options = {"reference": reference, "mc_estimator": estimator, "num_samples": arguments.num_masks,
               "seed": arguments.seed, "batch_size": arguments.batch_size}
    autoregressive = arguments.objective == "autoregressive"
    sampler = sampler_of(arguments, autoregressive)
    lm = load_model(arguments)
    found = [make_eval_model(lm.pretrained, str(arguments.model), mesh=lm.mesh, **options, sampler=sampler,
                             autoregressive=autoregressive)]
    if arguments.parent is not None:
        found.append(_load_autoregressive(arguments, arguments.parent, f"{arguments.parent} (parent)", **options))
    return found


def _load_autoregressive(arguments: argparse.Namespace, source: str, name: str, **options: Any) -> "EvalModel":
    """Returns the parent or the judge, on the mesh of the flags."""
    from dlm_jax.evaluation.make_eval_model import make_eval_model
    from dlm_jax.pipeline import DiffusionLM

    mesh = None if arguments.mesh is None else read_mesh(arguments.mesh)
    lm = DiffusionLM.from_pretrained(source, dtype=arguments.dtype, mesh=mesh)
    return make_eval_model(lm.pretrained, name, autoregressive=True, mesh=lm.mesh, **options)


@contextlib.contextmanager
def _records_file(out: str | None, settings: dict[str, Any]):
    """Yields the existing records and a function that adds records; completes the file at the end."""
    if out is None:
        yield [], lambda records: None
        return
    path = _items_path(out)
    with ResumeState(str(path), settings) as partial:
        lines = pathlib.Path(f"{path}.partial").read_text(encoding="utf-8").split("\n")[: partial.done]
        yield [json.loads(line) for line in lines], partial.add
        partial.finish()


def _items_path(out: str) -> pathlib.Path:
    return pathlib.Path(out).with_suffix(".items.jsonl")


def add_generation_arguments(parser: argparse._ArgumentGroup) -> None:
    parser.add_argument("--num_steps", type=int, help="forward passes per generated text (default 64; for the policy "
                        "threshold as many as needed, and at most one per token)")
    parser.add_argument("--policy", help="which tokens are revealed first, a policy of `dlm sample` "
                        "(default: confidence)")
    parser.add_argument("--threshold", type=float, help="the probability at which the policy threshold reveals "
                        "(default 0.9)")
    parser.add_argument("--block_length", type=int, help="generate blocks of this many tokens from left to right")


def sampler_of(arguments: argparse.Namespace, autoregressive: bool = False) -> "SamplerConfig":
    """Returns the sampler of the flags, at temperature 0.

    Raises:
      ConfigError: a value is wrong, or a flag is given for an autoregressive model.
    """
    from dlm_jax.sampling import SamplerConfig

    if autoregressive:
        for name in GENERATION_FLAGS:
            if getattr(arguments, name) is not None:
                raise ConfigError(f"--{name} is for diffusion models, and this one is evaluated as autoregressive; "
                                  "leave it out")
        return SamplerConfig("autoregressive", temperature=0.0)
    if arguments.policy == "autoregressive":
        raise ConfigError("--policy=autoregressive is not for diffusion models; use "
                          "--objective=autoregressive")
    return SamplerConfig(arguments.policy or SamplerConfig.policy, arguments.num_steps, threshold=arguments.threshold,
                         block_length=arguments.block_length, temperature=0.0)


def check_used(arguments: argparse.Namespace, generates: bool, where: str) -> None:
    """Raises ConfigError if a generation flag is given and nothing is generated."""
    for name in GENERATION_FLAGS:
        if getattr(arguments, name) is not None and not generates:
            raise ConfigError(f"--{name} is for generated texts, and {where} generates none; leave it out")


def read_prompt_file(path: str | None) -> tuple[str, dict[str, str]]:
    """Returns the text before each prompt, and its source."""
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


def make_job(task: "Task", arguments: argparse.Namespace, reference: bool, prefix: str) -> "tuple[Job, dict[str, str]]":
    """Returns a task with its items, and the file or hub dataset of the items with its digest."""
    from dlm_jax.evaluation.run import Job
    from dlm_jax.evaluation.tasks import digest, few_shot_prefix, hub_spec, load_items

    named = dict(_named_file(text) for text in arguments.data_files or ())
    for name in named:
        if name not in arguments.tasks.split(","):
            raise ConfigError(f"--data_files {name}={named[name]}: {name} is not among --tasks={arguments.tasks}")
    path = named.get(task.name) or _found(task, arguments.data_dir)
    items = load_items(task, path, reference=reference, limit=arguments.limit)
    about = {"task": task.name, "file": path, "sha256": digest(path)}
    if arguments.shots:
        if arguments.data_dir is None and (task.name in named or task.hub is None):
            raise ConfigError("--shots needs --data_dir, where the tasks' training files are")
        examples = hub_spec(task, "train") if arguments.data_dir is None else _found(task, arguments.data_dir, "train")
        shown = load_items(task, examples, limit=arguments.shots)
        if len(shown) < arguments.shots:
            raise ConfigError(f"--shots={arguments.shots}, and {examples} has {len(shown)} items")
        prefix = few_shot_prefix(shown)
        about |= {"shots_file": examples, "shots_sha256": digest(examples)}
    return Job(task, items, prefix), about


def _found(task: "Task", data_dir: str | None, split: str | None = None) -> str:
    """Returns the task's file in a folder, or its dataset on the hub."""
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
