"""Generates text: from nothing, after a prompt, into gaps, or for every line of a file.

  dlm sample --model=runs/first --num_samples=4
  dlm sample --model=runs/first --prompt="Once upon a time" --temperature=0.8 --stream
  dlm sample --model=runs/first --infill="Tom had a <mask:6> and was very happy." --trace=infill.html
  dlm sample --model=runs/first --prompts=prompts.jsonl --out=texts.jsonl

A file of prompts is .jsonl, with a JSON object per line that has a "prompt" or an "infill", and the output is that
object with a "text" added; or .txt, with a prompt per line. If it is stopped, the same command resumes.
"""

import argparse
import contextlib
import dataclasses
import itertools
import pathlib
import sys
from typing import TYPE_CHECKING, Any, Self

from dlm_jax.cli.shared import (
    add_json_argument,
    add_model_arguments,
    check_at_least_one,
    check_seed,
    load_model,
    write_result,
)
from dlm_jax.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

    from dlm_jax.pipeline import DiffusionLM
    from dlm_jax.sampling import SamplerConfig, SamplingStats, Snapshot

FLAGS = {"mask_token=": "--mask_token"}
MASK = "\N{LIGHT SHADE}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    texts = parser.add_mutually_exclusive_group()
    texts.add_argument("--prompt", nargs="+", action="extend", metavar="TEXT", help="texts to continue")
    texts.add_argument("--infill", nargs="+", action="extend", metavar="TEXT",
                       help="texts with gaps: <mask:12> is a gap of 12 tokens, <mask> one of --gap_length")
    texts.add_argument("--prompts", metavar="FILE", help="a .jsonl or .txt file of either; needs --out")
    parser.add_argument("--out", metavar="FILE", help="where the texts of --prompts go, as JSON lines")
    parser.add_argument("--num_samples", type=int, default=1, help="samples per text (default %(default)s)")
    parser.add_argument("--max_new_tokens", type=int, default=128,
                        help="tokens after a prompt (default %(default)s)")
    parser.add_argument("--gap_length", type=int, default=16, help="tokens in a plain <mask> (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed, the same text (default %(default)s)")
    parser.add_argument("--batch_size", type=int, default=16, help="texts at a time (default %(default)s)")
    add_sampler_arguments(parser)
    display = parser.add_argument_group("display")
    display.add_argument("--stream", action="store_true", help="show each denoising step in place, in a terminal")
    display.add_argument("--trace", metavar="FILE",
                         help="save all steps: a page that plays them (.html), or a picture of the first text (.png)")
    add_json_argument(parser)


def add_sampler_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds a flag per setting of `SamplerConfig`, whose module `--help` need not import; None where it is not given.

    A model may have defaults of its own, as LLaDA and Dream do.
    """
    steps = parser.add_argument_group("steps")
    steps.add_argument("--policy", help="which positions are revealed first: random, random_exact, first_hitting, "
                       "confidence, margin, entropy, threshold; or autoregressive, from left to right (default: the "
                       "model's own, as all settings below; else confidence; threshold for a model with blocks or with "
                       "--threshold; autoregressive for a model trained so)")
    steps.add_argument("--num_steps", type=int, help="denoising steps (default: 64; for first_hitting one per token, "
                       "for threshold as many as it takes)")
    steps.add_argument("--step_schedule", help="linear: equally many tokens at each step; cosine: few at first; dream: "
                       "as Dream's sampler (default: linear)")
    steps.add_argument("--block_length", type=int, help="fill blocks of this many positions from left to right")
    steps.add_argument("--threshold", type=float, help="the probability at which the policy threshold reveals a token "
                       "(default: 0.9)")
    steps.add_argument("--remask", type=float, help="the probability that a revealed token is masked again at a step "
                       "(default: 0)")
    tokens = parser.add_argument_group("tokens")
    tokens.add_argument("--temperature", type=float, help="0 takes the most likely token (default: 1)")
    tokens.add_argument("--top_p", type=float, help="sample from the most likely tokens that reach this probability")
    tokens.add_argument("--top_k", type=int, help="sample from this many most likely tokens")
    tokens.add_argument("--repetition_penalty", type=float, help="above 1 makes tokens that the text already has less "
                        "likely (default: 1)")
    tokens.add_argument("--eos_penalty", type=float, help="nats subtracted from the logit of the end of text; inf: "
                        "never end (default: 0)")
    tokens.add_argument("--cfg_scale", type=float, help="weight of classifier-free guidance by the given text, at "
                        "twice the cost (default: 0)")
    drafts = parser.add_argument_group("drafts", "speculative decoding: the text of the policy autoregressive, in "
                                       "fewer passes")
    drafts.add_argument("--drafter", help="what guesses the next tokens: ngram looks them up in the text so far; self: "
                        "the model does it itself; or the workdir or directory of a trained drafter (default: none)")
    drafts.add_argument("--num_drafts", type=int, help="tokens guessed at a time (default: 8, or a full block)")
    drafts.add_argument("--draft_threshold", type=float, help="the confidence below which a trained drafter's guess is "
                        "not checked (default: all are)")
    drafts.add_argument("--draft_vocab_size", type=int, help="guess among the first tokens of the vocabulary alone, "
                        "which is faster where the vocabulary is a large part of the model (default: all)")
    cache = parser.add_argument_group("cache")
    cache.add_argument("--cache", help="keys and values kept while a block is filled: none, prefix (those before it) "
                       "or dual (also those after it); faster, not exact (default: none)")
    cache.add_argument("--cache_refresh_interval", type=int,
                       help="steps until they are computed again (default: once per block)")


def run(arguments: argparse.Namespace) -> None:
    given = check(arguments)
    if arguments.prompts is None:
        sample_texts(arguments, given)
    else:
        sample_to_file(arguments, given)


def sample_texts(arguments: argparse.Namespace, settings: dict[str, Any]) -> None:
    """Samples the texts of the command line and prints them."""
    from dlm_jax.sampling import SamplingStats

    lm, stats = load_model(arguments), SamplingStats()
    config = complete_settings(settings, lm)
    given = [text for text in arguments.infill or arguments.prompt or [""] for _ in range(arguments.num_samples)]
    texts = sample_with_trace(lm, given, config, arguments, stats)
    samples = [{"infill" if arguments.infill else "prompt": source, "text": text}
               for source, text in zip(given, texts, strict=True)]
    heading = "" if len(texts) == 1 else "--- {number} of {total}\n"
    table = "\n\n".join(heading.format(number=i, total=len(texts)) + text for i, text in enumerate(texts, 1))
    write_result(arguments.json, {"model": lm.pretrained.source, **dataclasses.asdict(config), "seed": arguments.seed,
                                  "batch_size": arguments.batch_size, **stats.summary(), "samples": samples}, table)
    print(f"({stats})", file=sys.stderr)


def sample_to_file(arguments: argparse.Namespace, settings: dict[str, Any]) -> None:
    """Samples the texts of a file into another file."""
    from dlm_jax.cli.sample_file import read_prompts, sample_file

    prompts = read_prompts(arguments.prompts, max_new_tokens=arguments.max_new_tokens, gap_length=arguments.gap_length,
                           reserved=("text",) if arguments.num_samples == 1 else ("text", "sample"))
    lm = load_model(arguments)
    result = sample_file(prompts, arguments, lm, complete_settings(settings, lm))
    write_result(arguments.json, result,
                 f"{result['texts']} texts in {result['out']}; {result['texts_now']} of them now, "
                 f"{result['tokens_now']:,} tokens in {result['seconds']:.0f} s "
                 f"({result['tokens_now'] / result['seconds']:,.0f} per second, "
                 f"{result['tokens_per_pass']:.2f} per forward pass)")


def check(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the sampler's settings that are given; refuses whatever it can before a model is loaded."""
    from dlm_jax.sampling.text import split_gaps
    from dlm_jax.sampling.trace import check_path

    check_at_least_one(arguments, "num_samples", "max_new_tokens", "gap_length", "batch_size")
    check_seed("--seed", arguments.seed)
    if (arguments.prompts is None) != (arguments.out is None):
        raise ConfigError("--prompts and --out go together: a file of texts, and where the results go")
    if arguments.prompts is not None and (arguments.stream or arguments.trace):
        raise ConfigError("--stream and --trace show a few texts; give them with --prompt or --infill instead of "
                          "--prompts")
    if arguments.trace is not None:
        check_path(arguments.trace)
    for text in arguments.infill or ():
        split_gaps(text, arguments.gap_length)
    return sampler_settings(arguments)


def sampler_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the settings given by the flags of `add_sampler_arguments`; refuses what no model takes."""
    from dlm_jax.sampling import SamplerConfig, resolve_settings

    given = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(SamplerConfig)}
    resolve_settings(given, {})
    return {name: value for name, value in given.items() if value is not None}


def complete_settings(given: dict[str, Any], lm: "DiffusionLM") -> "SamplerConfig":
    """Returns the settings of the flags, with the model's own where none was given."""
    from dlm_jax.sampling import resolve_settings

    config = resolve_settings(given, lm.default_sampling)
    if "policy" not in given and config.policy != "autoregressive" and lm.pretrained.diffusion.mask_token_id is None:
        raise ConfigError(f"{lm.pretrained.source} records no mask token; name one with --mask_token, or "
                          "sample from left to right with --policy=autoregressive")
    return config


def sample_with_trace(lm: "DiffusionLM", given: list[str], config: "SamplerConfig",
                      arguments: argparse.Namespace, stats: "SamplingStats | None" = None) -> list[str]:
    """Returns the texts; shows and saves the steps as the flags say, and counts them in `stats`."""
    from dlm_jax.sampling.trace import Trace

    trace = Trace() if arguments.trace else None
    streaming = arguments.stream and sys.stdout.isatty()
    with LiveText(lm.tokenizer) if streaming else contextlib.nullcontext() as live:
        observers = [observer for observer in (trace, live) if observer is not None]
        settings: dict[str, Any] = {
            **dataclasses.asdict(config), "seed": arguments.seed, "batch_size": arguments.batch_size, "stats": stats,
            "on_step": (lambda snapshot: [observe(snapshot) for observe in observers]) if observers else None}
        if arguments.infill:
            texts = lm.infill(given, gap_length=arguments.gap_length, **settings)
        else:
            texts = lm.generate(given, max_new_tokens=arguments.max_new_tokens, **settings)
    if trace is not None:
        steps = "" if config.steps is None else f", {config.steps} steps"
        name = pathlib.PurePath(lm.pretrained.source).name
        trace.save(arguments.trace, lm.tokenizer, f"{name}, {config.policy}{steps}")
    return texts


class LiveText:
    """An `on_step` that shows each step in a terminal, in place of the one before, and nothing once it is closed."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase"):
        from rich.live import Live

        self._tokenizer, self._live = tokenizer, Live(auto_refresh=False, transient=True)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def __call__(self, snapshot: "Snapshot") -> None:
        self.show(snapshot.step, [
            partial_text(self._tokenizer, snapshot.tokens[i], snapshot.masked[i], snapshot.lengths[i])
            for i in snapshot.rows.argsort()])

    def show(self, step: int, texts: list[str]) -> None:
        from rich.text import Text

        # A generated control character would act on the terminal.
        printable = ["".join(c if c.isprintable() or c == "\n" else " " for c in text) for text in texts]
        self._live.update(Text("\n".join([f"step {step}", "\n\n".join(printable)]).rstrip("\n")), refresh=True)


def partial_text(tokenizer: "PreTrainedTokenizerBase", tokens: "np.ndarray", masked: "np.ndarray", length: int) -> str:
    """Returns the text of a row, arrays [length], with a `MASK` per masked token."""
    from dlm_jax.sampling.text import decode

    segments, gaps, known = [""], [], []  # to `decode`, what is masked is text and the tokens between are filled gaps
    for is_masked, run in itertools.groupby(range(length), key=lambda i: bool(masked[i])):
        run = list(run)
        if is_masked:
            segments[-1] = MASK * len(run)
        else:
            gaps.append(range(len(known), len(known) + len(run)))
            known += tokens[run].tolist()
            segments += [len(run), ""]
    return decode(tokenizer, segments, gaps, known)
