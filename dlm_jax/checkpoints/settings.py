"""Checks of settings in files of other programs; an error names the file, the setting and its value."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from dlm_jax.errors import CheckpointError

Kind = Literal["a number", "a positive number", "an integer", "a positive integer", "true or false", "an object",
               "a list of layers"]


def require(value: Any, name: str, kind: Kind, file: str | Path = "config.json") -> Any:
    """Returns the value of a setting; raises CheckpointError unless it is of a kind. No number is true or false."""
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    is_number = is_integer or isinstance(value, float)
    fits = {
        "a number": is_number, "a positive number": is_number and value > 0,
        "an integer": is_integer, "a positive integer": is_integer and value > 0,
        "true or false": isinstance(value, bool), "an object": isinstance(value, dict),
        "a list of layers": isinstance(value, list) and all(isinstance(layer, int) for layer in value),
    }  # fmt: skip
    if not fits[kind]:
        raise CheckpointError(f"{file} must give {name} as {kind}, not {value!r}")
    return value


def check_implemented(settings: Mapping[str, Any], implemented: Mapping[str, tuple[Any, ...]],
                      file: str | Path = "config.json", remedy: str = "") -> None:
    """Raises CheckpointError if a setting has a value that this library does not implement.

    Args:
      implemented: the values of each setting that it does; a setting that is absent has one of them.
      remedy: what to do, for the message.
    """
    for name, values in implemented.items():
        if name in settings and settings[name] not in values:
            known = " or ".join(dict.fromkeys(map(repr, values)))
            raise CheckpointError(f"{file} sets {name} to {settings[name]!r}, and this library implements {known} alone"
                                  f"{remedy}")
