"""Writes text: from nothing, after a prompt, into gaps, or for every line of a file.

  dlm sample --model=runs/first --num_samples=4
  dlm sample --model=runs/first --prompt="Once upon a time" --temperature=0.8 --stream
  dlm sample --model=runs/first --infill="Tom had a <mask:6> and was very happy." --trace=infill.html
  dlm sample --model=runs/first --prompts=prompts.jsonl --out=texts.jsonl

In a file each line is a JSON object with a "prompt" or an "infill", and the output is that object with a "text"; or
the file is .txt, a prompt a line. Stopped, the same command goes on.
"""

import argparse
import contextlib
import dataclasses
import pathlib
import time
from typing import TYPE_CHECKING

from dlm_jax.cli.shared import add_json_argument, add_model_arguments, load_model, write_result
from dlm_jax.errors import ConfigError

if TYPE_CHECKING:
    from dlm_jax.pipeline import DiffusionLM
    from dlm_jax.sampling import SamplerConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    texts = parser.add_mutually_exclusive_group()
    texts.add_argument("--prompt", nargs="+", action="extend", metavar="TEXT", help="texts to continue")
    texts.add_argument("--infill", nargs="+", action="extend", metavar="TEXT",
                       help="texts with gaps: <mask:12> stands for 12 tokens, <mask> for --gap_length")
    texts.add_argument("--prompts", metavar="FILE", help="a .jsonl or .txt file of either; needs --out")
    parser.add_argument("--out", metavar="FILE", help="where the texts of --prompts go, as JSON lines")
    parser.add_argument("--num_samples", type=int, default=1, help="how many for each text (default %(default)s)")
    parser.add_argument("--max_new_tokens", type=int, default=128,
                        help="tokens after a prompt (default %(default)s)")
    parser.add_argument("--gap_length", type=int, default=16, help="tokens in a plain <mask> (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed, the same text (default %(default)s)")
    parser.add_argument("--batch_size", type=int, default=16, help="texts at a time (default %(default)s)")
    add_sampler_arguments(parser)
    shown = parser.add_argument_group("showing how")
    shown.add_argument("--stream", action="store_true", help="show the text as it forms, in a terminal")
    shown.add_argument("--trace", metavar="FILE",
                       help="save how it formed: a page that plays it (.html), or a picture of the first text (.png)")
    add_json_argument(parser)


def add_sampler_arguments(parser: argparse.ArgumentParser) -> None:
    """A flag for each setting of `SamplerConfig`, whose module need not be imported for `--help`."""
    steps = parser.add_argument_group("steps")
    steps.add_argument("--policy", help="which positions are revealed first: random, random_exact, first_hitting, "
                       "confidence, margin, entropy, threshold; or autoregressive, from left to right (default: "
                       "confidence, or autoregressive for a model that was trained so)")
    steps.add_argument("--num_steps", type=int, help="denoising steps (default: 64; for first_hitting one a token, "
                       "for threshold as many as it takes)")
    steps.add_argument("--step_schedule", default="linear", help="linear: as many tokens each step; cosine: few at first "
                       "(default %(default)s)")
    steps.add_argument("--block_length", type=int, help="fill blocks of this many positions from left to right")
    steps.add_argument("--threshold", type=float, help="the probability at which the policy threshold reveals "
                       "(default: 0.9)")
    steps.add_argument("--remask", type=float, default=0.0, help="the chance that a revealed token is masked again at "
                       "a step (default %(default)s)")
    tokens = parser.add_argument_group("tokens")
    tokens.add_argument("--temperature", type=float, default=1.0,
                        help="0 takes the likeliest token (default %(default)s)")
    tokens.add_argument("--top_p", type=float, help="draw from the likeliest tokens that reach this probability")
    tokens.add_argument("--top_k", type=int, help="draw from this many likeliest tokens")
    tokens.add_argument("--repetition_penalty", type=float, default=1.0, help="above 1 makes tokens that are there "
                        "already less likely (default %(default)s)")
    tokens.add_argument("--eos_penalty", type=float, default=0.0, help="nats off the end of text; inf: never end "
                        "(default %(default)s)")
    tokens.add_argument("--cfg_scale", type=float, default=0.0, help="how far to lean towards the given text, at twice "
                        "the work (default %(default)s)")
    cache = parser.add_argument_group("cache")
    cache.add_argument("--cache", default="none", help="keys and values kept while a block is filled: none, prefix "
                       "(before it) or dual (behind it too); faster, not exact (default %(default)s)")
    cache.add_argument("--cache_refresh_interval", type=int, help="steps until they are computed anew (default: once a block)")


def run(arguments: argparse.Namespace) -> None:
    config = check(arguments)
    if arguments.prompts is None:
        write_texts(arguments, config)
    else:
        write_file(arguments, config)


def write_texts(arguments: argparse.Namespace, config: "SamplerConfig") -> None:
    """Continues or fills the texts of the command line, and prints them."""
    lm = load_model(arguments)
    config = resolve_policy(config, arguments.policy, lm)
    given = [text for text in arguments.infill or arguments.prompt or [""] for _ in range(arguments.num_samples)]
    start = time.perf_counter()
    texts = sample_with_trace(lm, given, config, arguments)
    seconds = time.perf_counter() - start
    samples = [{"infill" if arguments.infill else "prompt": source, "text": text}
               for source, text in zip(given, texts, strict=True)]
    heading = "" if len(texts) == 1 else "--- {number} of {total}\n"
    table = "\n\n".join(heading.format(number=i, total=len(texts)) + text for i, text in enumerate(texts, 1))
    write_result(arguments.json, {"model": lm.pretrained.source, **dataclasses.asdict(config), "seed": arguments.seed,
                                  "batch_size": arguments.batch_size, "seconds": seconds, "samples": samples}, table)


def write_file(arguments: argparse.Namespace, config: "SamplerConfig") -> None:
    """Continues or fills the texts of a file, into another."""
    from dlm_jax.cli.partial import check_output
    from dlm_jax.cli.sample_file import sample_file, table
    from dlm_jax.cli.sample_inputs import read_inputs

    check_output(arguments.out)
    inputs = read_inputs(arguments.prompts, max_new_tokens=arguments.max_new_tokens, gap_length=arguments.gap_length,
                         taken=("text",) if arguments.num_samples == 1 else ("text", "sample"))
    lm = load_model(arguments)
    result = sample_file(inputs, arguments, lm, resolve_policy(config, arguments.policy, lm))
    write_result(arguments.json, result, table(result))


def check(arguments: argparse.Namespace) -> "SamplerConfig":
    """The sampler's settings, after everything that can be refused before a model is loaded."""
    from dlm_jax.sampling.text import split_gaps
    from dlm_jax.sampling.trace import check_path

    check_at_least_one(arguments, "num_samples", "max_new_tokens", "gap_length", "batch_size")
    check_seed("--seed", arguments.seed)
    if (arguments.prompts is None) != (arguments.out is None):
        raise ConfigError("--prompts and --out go together: a file of texts, and where the results go")
    if arguments.prompts is not None and (arguments.stream or arguments.trace):
        raise ConfigError("--stream and --trace show a few texts; give those with --prompt or --infill instead of "
                          "--prompts")
    if arguments.trace is not None:
        check_path(arguments.trace)
    for text in arguments.infill or ():
        split_gaps(text, arguments.gap_length)
    return sampler_settings(arguments)


def check_at_least_one(arguments: argparse.Namespace, *names: str) -> None:
    for name in names:
        if getattr(arguments, name) < 1:
            raise ConfigError(f"--{name} must be at least 1, got {getattr(arguments, name)}")


def check_seed(name: str, seed: int) -> None:
    if not 0 <= seed < 1 << 32:
        raise ConfigError(f"{name} must lie between 0 and {(1 << 32) - 1}, got {seed}")


def sampler_settings(arguments: argparse.Namespace) -> "SamplerConfig":
    """What the flags of `add_sampler_arguments` say."""
    from dlm_jax.sampling import SamplerConfig

    settings = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(SamplerConfig)}
    return SamplerConfig(**settings | {"policy": arguments.policy or SamplerConfig.policy})


def resolve_policy(config: "SamplerConfig", policy: str | None, lm: "DiffusionLM") -> "SamplerConfig":
    """What a model that was trained autoregressively, or that has no mask token, makes of a policy not given."""
    if policy is not None:
        return config
    if lm.pretrained.is_autoregressive:
        return dataclasses.replace(config, policy="autoregressive")
    if lm.pretrained.mask_token_id is None:
        raise ConfigError(f"{lm.pretrained.source} records no mask token; name one with --mask_token, or write from "
                          "left to right with --policy=autoregressive")
    return config


def sample_with_trace(lm: "DiffusionLM", given: list[str], config: "SamplerConfig", arguments: argparse.Namespace) -> list[str]:
    """The texts; how they form is shown or saved where that is asked for."""
    from dlm_jax.cli.live import Live
    from dlm_jax.sampling.trace import Trace

    trace = Trace() if arguments.trace else None
    with Live(lm.tokenizer) if arguments.stream else contextlib.nullcontext() as live:
        watchers = [watcher for watcher in (trace, live) if watcher is not None]
        settings = {**dataclasses.asdict(config), "seed": arguments.seed, "batch_size": arguments.batch_size,
                    "on_step": (lambda snapshot: [watch(snapshot) for watch in watchers]) if watchers else None}
        if arguments.infill:
            texts = lm.infill(given, gap_length=arguments.gap_length, **settings)
        else:
            texts = lm.generate(given, max_new_tokens=arguments.max_new_tokens, **settings)
    if trace is not None:
        steps = "" if config.steps is None else f", {config.steps} steps"
        name = pathlib.PurePath(lm.pretrained.source).name
        trace.save(arguments.trace, lm.tokenizer, f"{name}, {config.policy}{steps}")
    return texts
