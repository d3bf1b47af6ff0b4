"""Writes text with a diffusion language model: from nothing, after a prompt, or into gaps.

  dlm sample --model=runs/first --num_samples=4
  dlm sample --model=runs/first --prompt="Once upon a time" --temperature=0.8
  dlm sample --model=runs/first --infill="Tom had a <mask:6> and was very happy."
"""

import argparse
import time

from dlm_jax.cli.shared import add_json_argument, add_model_arguments, load_model, write_result
from dlm_jax.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    texts = parser.add_mutually_exclusive_group()
    texts.add_argument("--prompt", nargs="+", action="extend", metavar="TEXT", help="texts to continue")
    texts.add_argument("--infill", nargs="+", action="extend", metavar="TEXT",
                       help="texts with gaps: <mask:12> stands for 12 tokens, <mask> for --gap_length")
    parser.add_argument("--num_samples", type=int, default=1, help="how many for each text (default %(default)s)")
    parser.add_argument("--max_new_tokens", type=int, default=128,
                        help="tokens after a prompt (default %(default)s)")
    parser.add_argument("--gap_length", type=int, default=16, help="tokens in a plain <mask> (default %(default)s)")
    parser.add_argument("--num_steps", type=int, default=64, help="denoising steps (default %(default)s)")
    parser.add_argument("--policy", default="confidence",
                        help="which positions are revealed first (default %(default)s)")
    parser.add_argument("--temperature", type=float, default=1.0,
                        help="0 takes the likeliest token (default %(default)s)")
    parser.add_argument("--top_p", type=float, help="draw from the likeliest tokens that reach this probability")
    parser.add_argument("--top_k", type=int, help="draw from this many likeliest tokens")
    parser.add_argument("--seed", type=int, default=0, help="the same seed, the same text (default %(default)s)")
    parser.add_argument("--batch_size", type=int, default=16, help="texts at a time (default %(default)s)")
    add_json_argument(parser)


def run(arguments: argparse.Namespace) -> None:
    if arguments.num_samples < 1:
        raise ConfigError(f"--num_samples must be at least 1, got {arguments.num_samples}")
    settings = {name: getattr(arguments, name) for name in
                ("num_steps", "policy", "temperature", "top_p", "top_k", "seed", "batch_size")}
    given = [text for text in arguments.infill or arguments.prompt or [""] for _ in range(arguments.num_samples)]
    from dlm_jax.sampling import SamplerConfig

    SamplerConfig(*(settings[name] for name in ("policy", "num_steps", "temperature", "top_p", "top_k")))  # or refuses
    lm = load_model(arguments)
    start = time.perf_counter()
    if arguments.infill:
        texts = lm.infill(given, gap_length=arguments.gap_length, **settings)
    else:
        texts = lm.generate(given, max_new_tokens=arguments.max_new_tokens, **settings)
    seconds = time.perf_counter() - start
    samples = [{"infill" if arguments.infill else "prompt": source, "text": text}
               for source, text in zip(given, texts, strict=True)]
    heading = "" if len(texts) == 1 else "--- {number} of {total}\n"
    table = "\n\n".join(heading.format(number=i, total=len(texts)) + text for i, text in enumerate(texts, 1))
    write_result(arguments.json, {"model": lm.pretrained.source, **settings, "seconds": seconds, "samples": samples},
                 table)
