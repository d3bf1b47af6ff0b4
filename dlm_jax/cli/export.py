"""Writes a model as a Hugging Face directory (weights, config, tokenizer, a model card), or for inference engines.

  dlm export --model=runs/first@5000 --output=first-hf
  dlm export --model=runs/first --output=first-diffugpt --layout=diffugpt
  dlm export --model=runs/lora --output=first-adapter --layout=peft
  dlm export --model=runs/blocks --output=first-sdar --layout=sdar --dtype=bfloat16
  dlm export --drafter=runs/drafter@best --output=first-dflash --dtype=bfloat16
  dlm export --drafter=runs/drafter --model=target.gguf --layout=gguf --output=first-drafter.gguf
"""

import argparse
import pathlib

from dlm_jax.cli.shared import add_model_arguments, load_model
from dlm_jax.errors import ConfigError

MODEL_LAYOUTS = ("hf", "diffugpt", "peft", "sdar", "dream")
DRAFTER_LAYOUTS = ("dflash", "dspark", "dflash2", "gguf")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser, computes=False, required=False)
    parser.add_argument("--drafter", metavar="SOURCE", help="write this drafter, a workdir[@step] or a directory in "
                        "another layout; --model is then its target (default: the one that the run records)")
    parser.add_argument("--output", required=True, metavar="DIR", help="the directory, or with "
                        "--layout=gguf the file, to write")
    parser.add_argument("--layout", choices=MODEL_LAYOUTS + DRAFTER_LAYOUTS,
                        help="hf: for transformers (the default); diffugpt: for the DiffuLLaMA reference "
                        "implementation; peft: the adapter of a run with LoRA alone; sdar: for SGLang, LMDeploy and "
                        "JetEngine; dream: for llama.cpp's converter; dflash, dspark, dflash2: of a "
                        "drafter, for inference engines (default: the one that has its parts); gguf: of a drafter, for "
                        "llama.cpp, beside a target that is a GGUF file")


def run(arguments: argparse.Namespace) -> None:
    from dlm_jax.storage import check_replaceable, is_remote

    if arguments.model is None and arguments.drafter is None:
        raise ConfigError("there is nothing to export; name a model with --model, or a drafter with --drafter")
    layouts = MODEL_LAYOUTS if arguments.drafter is None else DRAFTER_LAYOUTS
    if arguments.layout not in (None, *layouts):
        kind = "model" if arguments.drafter is None else "drafter"
        raise ConfigError(f"--layout={arguments.layout} is not for a {kind}; choose {', '.join(layouts)}, or leave it "
                          "out")
    if not is_remote(arguments.output) and arguments.layout != "gguf":
        check_replaceable(pathlib.Path(arguments.output).expanduser())
    source, layout = _export_model(arguments) if arguments.drafter is None else _export_drafter(arguments)
    print(f"{source} is in {arguments.output}, layout {layout}, {arguments.dtype}")


def _export_model(arguments: argparse.Namespace) -> tuple[str, str]:
    """Returns the model's source and the layout."""
    from dlm_jax.checkpoints.source import has_lora

    layout = arguments.layout or "hf"
    if layout == "peft" and not has_lora(arguments.model):
        raise ConfigError(f"--layout=peft writes the adapter of a run with LoRA, and {arguments.model} is not the "
                          "workdir of one; leave --layout out")
    pretrained = load_model(arguments, merge=layout != "peft").pretrained
    from dlm_jax.checkpoints import save_pretrained

    save_pretrained(arguments.output, pretrained, layout=layout, dtype=arguments.dtype)
    return pretrained.source, layout


def _export_drafter(arguments: argparse.Namespace) -> tuple[str, str]:
    """Returns the drafter's source and the layout."""
    from dlm_jax.checkpoints import open_drafter, save_drafter
    from dlm_jax.checkpoints.drafter import recorded_target
    from dlm_jax.checkpoints.drafter_config import layout_of

    arguments.model = arguments.model or recorded_target(arguments.drafter)
    if arguments.model is None:
        raise ConfigError(f"{arguments.drafter} does not say whose drafter it is; name its target with --model")
    target = load_model(arguments).pretrained
    drafter = open_drafter(arguments.drafter, target=target.model).drafter
    if arguments.layout == "gguf":
        from dlm_jax.checkpoints.drafter_gguf import save_drafter_gguf

        save_drafter_gguf(arguments.output, drafter, target, dtype=arguments.dtype)
    else:
        save_drafter(arguments.output, drafter, target, arguments.layout, dtype=arguments.dtype)
    return arguments.drafter, arguments.layout or layout_of(drafter.config)
