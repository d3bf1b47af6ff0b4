"""Fields of configuration dataclasses, and checks of their values that name the key."""

import dataclasses
import math
import typing
from collections.abc import Mapping
from typing import Literal, TypeVar

from dlm_jax.errors import ConfigError

Config = TypeVar("Config")


def field(default: typing.Any, help: str) -> typing.Any:
    """Returns a dataclass field with a default and the meaning that `--print_config` shows."""
    return dataclasses.field(default=default, metadata={"help": help})


def open_field(parent: type, name: str) -> typing.Any:
    """Returns a field of a subclass of `parent` that is None where a recipe leaves it open; see `settle`."""
    original = parent.__dataclass_fields__[name]
    default = str(original.default).lower() if isinstance(original.default, bool) else original.default
    if isinstance(default, str) and not default.isprintable():
        default = repr(default)
    return field(None, f"{original.metadata['help']}; None: as the source records, or else {default}")


def settle(config: Config, parent: type[Config], recorded: Mapping[str, typing.Any]) -> Config:
    """Returns the fields of `config` as a `parent`: what is None is as in `recorded`, or else by default."""
    stated = {item.name: getattr(config, item.name) for item in dataclasses.fields(parent)}
    return parent(**{**recorded, **{name: value for name, value in stated.items() if value is not None}})


def check_choices(config: object, group: str = "") -> None:
    """Checks every `Literal` field of a dataclass.

    Args:
      group: the group's dotted key, such as "data.examples"; empty for the root.

    Raises:
      ConfigError: a field has none of its choices.
    """
    for name, kind in typing.get_type_hints(type(config)).items():
        choices = typing.get_args(kind) if typing.get_origin(kind) is Literal else ()
        value = getattr(config, name)
        if choices and value not in choices:
            key = f"{group}.{name}" if group else name
            raise ConfigError(f"{key} must be one of {', '.join(map(str, choices))}, got {value!r}")


def check_at_least(value: float, least: float, name: str) -> None:
    """Raises ConfigError unless `value >= least`."""
    check_range(value, least, math.inf, name)


def check_range(value: float, low: float, high: float, name: str, *, open_low: bool = False,
                open_high: bool = False) -> None:
    """Raises ConfigError unless `value` is between `low` and `high`; an open bound excludes its value."""
    above = low < value if open_low else low <= value
    below = value < high if open_high else value <= high
    if above and below:
        return
    if high == math.inf:
        bounds = f"greater than {low}" if open_low else f"at least {low}"
    else:
        bounds = f"in {'(' if open_low else '['}{low}, {high}{')' if open_high else ']'}"
    raise ConfigError(f"{name} must be {bounds}, got {value}")
