"""Typed values: text from a command line or a Python value, checked against the annotation of a dataclass field."""

import ast
import difflib
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, Union

_NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "text", types.NoneType: "none"}
_TRUTH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


class InvalidValue(ValueError):
    """The value is not of the kind asked for."""


def read(text: str, kind: Any) -> Any:
    """`text` as typed on a command line, as a value of `kind`: `none`, `1e6`, `a,b,c`, `((0,0.5,1),)`.

    Raises:
      Unfit: it is none.
    """
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return _first_fit(read, text, inner)
    if origin is Literal:
        return fit(next((choice for choice in inner if str(choice) == text), text), kind)
    if origin is tuple and inner[-1] is Ellipsis and not text.strip().startswith(("(", "[")):
        return tuple(read(item, inner[0]) for item in text.split(",") if item)
    if kind in (bool, types.NoneType):
        words = _TRUTH if kind is bool else {"none": None}
        if text.lower() not in words:
            raise InvalidValue
        return words[text.lower()]
    if kind is str:
        return text
    try:
        return fit(ast.literal_eval(text.strip()) if origin is tuple else _number(text, kind), kind)
    except (ValueError, SyntaxError, OverflowError) as error:
        raise InvalidValue from error


def fit(value: Any, kind: Any) -> Any:
    """`value` as one of `kind`; integers pass for numbers and lists for tuples, nothing else converts.

    Raises:
      Unfit: it is none.
    """
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return _first_fit(fit, value, inner)
    if origin is Literal:
        fits = any(value == choice and type(value) is type(choice) for choice in inner)
    elif origin is tuple:
        kinds = inner[:1] * len(value) if inner[-1] is Ellipsis and isinstance(value, list | tuple) else inner
        if not isinstance(value, list | tuple) or len(kinds) != len(value):
            raise InvalidValue
        return tuple(fit(item, item_kind) for item, item_kind in zip(value, kinds, strict=True))
    elif kind is float and type(value) is int:
        return float(value)
    else:
        fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    if not fits:
        raise InvalidValue
    return value


def name(kind: Any) -> str:
    """`kind` in words: "an integer or none"."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(name(one) for one in inner)
    if origin is Literal:
        return "one of " + ", ".join(map(str, inner))
    if origin is tuple and inner[-1] is Ellipsis:
        return f"a list of {name(inner[0]).removeprefix('an ').removeprefix('a ')}"
    if origin is tuple:
        return f"({', '.join(map(name, inner))})"
    return _NAMES[kind]


def show(value: Any) -> str:
    """`value` as it would be typed on a command line."""
    if isinstance(value, tuple) and not any(isinstance(item, tuple) for item in value):
        return ",".join(map(show, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def choices(kind: Any) -> tuple[str, ...]:
    """The words `kind` allows, where it is a closed list of them."""
    return tuple(map(str, typing.get_args(kind))) if typing.get_origin(kind) is Literal else ()


def closest(word: str, eval_models: Iterable[str]) -> str | None:
    """The candidate that `word` most probably misspells."""
    return next(iter(difflib.get_close_matches(word, list(eval_models), n=1)), None)


def hint(word: str, eval_models: Iterable[str]) -> str:
    """` (did you mean x?)`, or nothing."""
    match = closest(word, eval_models)
    return f" (did you mean {match}?)" if match else ""


def _number(text: str, kind: type) -> int | float:
    if kind is int and not text.strip("+-_ 0123456789"):
        return int(text)
    number = float(text)
    if number != number:
        raise InvalidValue
    return int(number) if kind is int and number.is_integer() else number  # 1e6 is an integer too


def _first_fit(convert: Callable[[Any, Any], Any], value: Any, kinds: Sequence[Any]) -> Any:
    # Every text fits text, so that comes last.
    for kind in sorted(kinds, key=lambda kind: kind is str):
        try:
            return convert(value, kind)
        except InvalidValue:
            continue
    raise InvalidValue
