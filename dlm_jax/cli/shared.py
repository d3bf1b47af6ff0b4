"""What the commands that use a model have in common."""

import argparse
import json
import pathlib
from typing import TYPE_CHECKING

from dlm_jax.cli.values import read

if TYPE_CHECKING:
    from dlm_jax.pipeline import DiffusionLM


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="a directory, a hub id, or a workdir[@step]")
    parser.add_argument("--mask_token", metavar="TOKEN",
                        help="an id or a token, if the model records none or another one is wanted")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32",
                        help="of parameters and activations (default %(default)s)")


def load_model(arguments: argparse.Namespace) -> "DiffusionLM":
    """What `--model`, `--mask_token` and `--dtype` name."""
    from dlm_jax.pipeline import DiffusionLM

    mask_token = None if arguments.mask_token is None else read(arguments.mask_token, int | str)
    return DiffusionLM.from_pretrained(arguments.model, mask_token=mask_token, dtype=arguments.dtype)


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE", help="also write the result there; - for standard output, alone")


def write_result(destination: str | None, result: object, table: str) -> None:
    """Prints `table` for people, or `result` as JSON if `destination` is "-"; writes JSON to any other destination."""
    print(json.dumps(result, indent=1) if destination == "-" else table)
    if destination in (None, "-"):
        return
    from dlm_jax.training.workdir import write_json

    write_json(pathlib.Path(destination), result)
