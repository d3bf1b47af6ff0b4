"""Writes a model as a Hugging Face directory: weights, config, tokenizer, a model card.

  dlm export --model=runs/first@5000 --output=first-hf
  dlm export --model=runs/first --output=first-diffugpt --layout=diffugpt
  dlm export --model=runs/lora --output=first-adapter --layout=peft
"""

import argparse
import pathlib

from dlm_jax.cli.shared import add_model_arguments, load_model
from dlm_jax.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser, computes=False)
    parser.add_argument("--output", required=True, metavar="DIR", help="the directory to write")
    parser.add_argument("--layout", choices=("hf", "diffugpt", "peft"), default="hf",
                        help="hf: for transformers; diffugpt: for the DiffuLLaMA reference implementation; peft: the "
                        "adapter of a run with LoRA alone (default %(default)s)")


def run(arguments: argparse.Namespace) -> None:
    from dlm_jax.checkpoints.source import has_lora
    from dlm_jax.storage import check_replaceable, is_remote

    if arguments.layout == "peft" and not has_lora(arguments.model):
        raise ConfigError(f"--layout=peft writes the adapter of a run with LoRA, and {arguments.model} is not the "
                          "workdir of one; leave --layout out")
    if not is_remote(arguments.output):
        check_replaceable(pathlib.Path(arguments.output).expanduser())
    pretrained = load_model(arguments, merge=arguments.layout != "peft").pretrained
    from dlm_jax.checkpoints import save_pretrained

    save_pretrained(arguments.output, pretrained, layout=arguments.layout, dtype=arguments.dtype)
    print(f"{pretrained.source} is in {arguments.output}, layout {arguments.layout}, {arguments.dtype}")
