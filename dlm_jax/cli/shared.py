"""What the commands that use a model have in common."""

import argparse
import json
import pathlib
from typing import TYPE_CHECKING

from dlm_jax.cli.values import read
from dlm_jax.errors import ConfigError

if TYPE_CHECKING:
    from dlm_jax.parallel import MeshConfig
    from dlm_jax.pipeline import DiffusionLM


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="a directory, a hub id, or a workdir[@step]")
    parser.add_argument("--base", metavar="MODEL", help="of an adapter in PEFT's format, in place of the base it names")
    parser.add_argument("--mask_token", metavar="TOKEN",
                        help="an id or a token, if the model records none or another one is wanted")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32",
                        help="of parameters and activations (default %(default)s)")
    parser.add_argument("--mesh", metavar="AXIS=SIZE,...", help="split the model and the texts over all devices, as "
                        "fsdp=-1 or data=2,tensor=4; -1 takes the devices that are left (default: the first alone)")


def load_model(arguments: argparse.Namespace, merge: bool = True) -> "DiffusionLM":
    """What `--model`, `--base`, `--mask_token`, `--dtype` and `--mesh` name; `merge` as in `from_pretrained`."""
    from dlm_jax.pipeline import DiffusionLM

    mask_token = None if arguments.mask_token is None else read(arguments.mask_token, int | str)
    return DiffusionLM.from_pretrained(arguments.model, mask_token=mask_token, dtype=arguments.dtype,
                                       mesh=None if arguments.mesh is None else read_mesh(arguments.mesh),
                                       merge=merge, base=arguments.base)


def read_mesh(text: str) -> "MeshConfig":
    """`data=2,tensor=4` as a mesh; an axis that is not named has size 1."""
    from dlm_jax.parallel import AXES, MeshConfig

    sizes = dict.fromkeys(AXES, 1)
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if axis not in sizes or not size.removeprefix("-").isdecimal():
            raise ConfigError(f"--mesh={text}: {part!r} is no axis with its size; write for example fsdp=-1 or "
                              f"data=2,tensor=4, with axes of {', '.join(AXES)}")
        sizes[axis] = int(size)
    return MeshConfig(**sizes)


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE", help="also write the result there; - for standard output, alone")


def write_result(destination: str | None, result: object, table: str) -> None:
    """Prints `table` for people, or `result` as JSON if `destination` is "-"; writes JSON to any other destination."""
    print(json.dumps(result, indent=1) if destination == "-" else table)
    if destination in (None, "-"):
        return
    from dlm_jax.storage import write_json

    write_json(pathlib.Path(destination), result)
