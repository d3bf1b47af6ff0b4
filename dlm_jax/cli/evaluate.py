"""Evaluates a model: on tasks, next to its parent, or by the likelihood of held-out text in nats per token.

For a diffusion model likelihoods are bounds, estimated from random masks; for an autoregressive model they are exact.

  dlm evaluate --model=runs/first --tasks=hellaswag,lambada_openai --parent=gpt2 --out=results.json
  dlm evaluate --model=runs/first --tasks=gsm8k --data_dir=tasks --num_fewshot=4 --limit=100
  dlm evaluate --model=runs/first --data heldout.jsonl --json=bound.json
  dlm evaluate --model=gpt2 --data heldout.jsonl --objective=autoregressive
  dlm evaluate --model=runs/gsm8k --examples test.txt --json=answers.json

Tasks are those of lm-eval, the LM Evaluation Harness, with its prompts and metrics (`lm_eval ls tasks` lists them), and
rocstories, humaneval_fim_single_line, humaneval_fim_multi_line, humaneval_fim_random_span,
gsm8k_icot, text, reconstruction, generation, and those of the paper's scripts, diffullama_hellaswag and its like.
"""

import argparse
import contextlib
import dataclasses
import math
import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from dlm_jax.cli.evaluate_tasks import (
    GENERATION_FLAGS,
    TASK_DEFAULTS,
    add_generation_arguments,
    add_task_arguments,
    run_tasks,
    sampler_of,
)
from dlm_jax.cli.shared import add_json_argument, add_model_arguments, check_at_least_one, load_model, write_result
from dlm_jax.errors import ConfigError

if TYPE_CHECKING:
    from dlm_jax.data.config import DataConfig
    from dlm_jax.data.rows import RowSource
    from dlm_jax.diffusion import Batch
    from dlm_jax.pipeline import DiffusionLM

FLAGS = {"mask_token=": "--mask_token", "data.train": "--data", "data.length": "--length",
         "data.text_key": "--text_key", "data.document_separator": "--document_separator"}
# The flags of each mode, besides those of all modes, with their defaults. The parser's own default is None.
_GENERATION = dict.fromkeys(GENERATION_FLAGS)
_OWN = {"tasks": TASK_DEFAULTS | _GENERATION,
        "data": {"num_rows": 256, "length": None, "document_separator": "", "text_key": "text"},
        "examples": {"limit": None} | _GENERATION}


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
    add_generation_arguments(parser.add_argument_group("generation: tasks, examples"))


def run(arguments: argparse.Namespace) -> None:
    given = [name for name in _MODES if getattr(arguments, name) is not None]
    if len(given) != 1:
        raise ConfigError("name what to evaluate on: --tasks=NAME,..., --data FILE or --examples FILE, exactly one of "
                          "them")
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
    from dlm_jax.evaluation.compare import mean_of
    from dlm_jax.evaluation.generation_eval import answer, judge, questions_of

    check_at_least_one(arguments, "limit", "num_steps", "num_masks")
    lm = load_model(arguments)
    recipe = lm.pretrained.recipe or {}
    if recipe.get("data.examples.format", "none") == "none":
        raise ConfigError(f"{arguments.model} has not been fine-tuned on examples, so their prompt format is unknown; "
                          "evaluate it with --tasks or --data")
    autoregressive = arguments.objective == "autoregressive" or lm.pretrained.is_autoregressive
    sampler = sampler_of(arguments, autoregressive, lm.default_sampling)
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


_MODES = {"tasks": run_tasks, "data": _run_text, "examples": _run_examples}
