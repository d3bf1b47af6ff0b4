"""`dlm evaluate --examples`: how a fine-tuned model answers examples of the kind it has learnt from.

They are read, asked and judged as the run's own held-out examples were, in rows of the same length.
"""

import argparse
import dataclasses
import tempfile

from dlm_jax.cli.evaluate_writing import sampler_of
from dlm_jax.cli.shared import load_model, write_result
from dlm_jax.errors import ConfigError


def add_arguments(parser: argparse._ArgumentGroup) -> None:
    """What is not given stays None; `evaluate` knows the defaults."""
    parser.add_argument("--examples", nargs="+", action="extend", metavar="FILE",
                        help="files, globs, a directory made by `dlm prepare`, tfds:NAME, hf:NAME; --limit "
                        "and --num_samples hold here too")


def run(arguments: argparse.Namespace) -> None:
    from dlm_jax.data.config import DataConfig
    from dlm_jax.data.corpus import load_rows
    from dlm_jax.data.loader import Loader
    from dlm_jax.evaluation import autoregressive_nll, bound
    from dlm_jax.evaluation.generation_eval import answer, judge, questions_of
    from dlm_jax.evaluation.report import mean_of

    for name in ("limit", "num_steps", "num_samples"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            raise ConfigError(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    lm = load_model(arguments)
    recipe = lm.pretrained.recipe or {}
    if recipe.get("data.examples.format", "none") == "none":
        raise ConfigError(f"{arguments.model} has not been fine-tuned on examples, so that it is not on record how to "
                          "ask it; evaluate it with --tasks or --data")
    autoregressive = arguments.objective == "autoregressive" or lm.pretrained.is_autoregressive
    sampler = sampler_of(arguments, autoregressive)
    form = dataclasses.replace(lm.prompt_format(), length=recipe["data.length"])
    data = DataConfig(train=tuple(arguments.examples), validation_fraction=0.0, length=form.length,
                      examples=form.config)
    with tempfile.TemporaryDirectory() as folder:
        (source,), held_out = load_rows(data, lm.tokenizer, vocab_size=lm.config.vocab_size, cache_dir=folder)
        source = source if held_out is None else held_out  # prepared rows may have a held-out part
        number = min(len(source), arguments.limit or len(source))
        rows, batch = source[slice(0, number)], Loader([source], number, shuffle=False).batch(0)
    scored = {"segment_ids": batch.segment_ids, "batch_size": arguments.batch_size}
    if autoregressive:
        estimate = autoregressive_nll(lm.model, batch.tokens, batch.noisable_mask, **scored)
    else:
        estimate = bound(lm.model, batch.tokens, batch.noisable_mask, diffusion=lm.diffusion, seed=arguments.seed,
                         num_samples=arguments.num_samples or 16, **scored)
    questions = questions_of(rows, form)
    texts = answer(lm.model, questions, form, sampler, diffusion=lm.pretrained.diffusion, seed=arguments.seed,
                   batch_size=arguments.batch_size, mesh=lm.mesh, progress=True)
    values = judge(texts, questions, form)
    records = [{"prompt": lm.tokenizer.decode(question.prompt, skip_special_tokens=True), "answer": question.answer,
                "text": text, "values": value}
               for question, text, value in zip(questions, texts, values, strict=True)]
    result = {"model": lm.pretrained.source, "objective": "autoregressive" if autoregressive else "diffusion",
              "examples": arguments.examples, "num_examples": number, "length": form.length,
              "policy": sampler.policy, "num_steps": sampler.steps, "threshold": sampler.reveal_threshold,
              "block_length": sampler.block_length, "nats_per_token": estimate.nats_per_token,
              "standard_error": estimate.standard_error,
              "values": {name: dataclasses.asdict(mean_of([value[name] for value in values]))
                         for name in values[0]}}
    write_result(arguments.json, {**result, "records": records}, _table(result))


def _table(result: dict) -> str:
    at_most = "at most " if result["objective"] == "diffusion" else ""
    lines = {"model": f"{result['model']}, {result['objective']}",
             "examples": f"{result['num_examples']}, in rows of {result['length']}",
             "nats per token": f"{at_most}{result['nats_per_token']:.4f}"}
    for name, value in result["values"].items():
        error = "" if value["standard_error"] is None else f" +- {value['standard_error']:.3f}"
        lines[name] = f"{value['mean']:.3f}{error}"
    return "\n".join(f"{name:<16}{value}" for name, value in lines.items())
