"""Recipes and `--config.key=value` overrides become frozen dataclasses, and back.

A recipe is a Python file whose `get_config()` returns an `ml_collections.ConfigDict`. The dataclasses own keys, types,
defaults and help. Every mistake is one sentence that names the key. (`ml_collections.config_flags` takes types from
values: it refuses to override a key that is None, and knows neither unions nor choices nor frozen dataclasses.)
"""

import ast
import contextlib
import copy
import dataclasses
import importlib.util
import pathlib
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, TypeVar, Union

import ml_collections

from dlm_jax.errors import ConfigError, did_you_mean

Config = TypeVar("Config")
_PACKAGE = pathlib.Path(__file__).parents[1]


# ---- Recipes: names, files and defaults.


def train_defaults() -> ml_collections.ConfigDict:
    """Returns every key of a training run at its default: where a recipe starts."""
    from dlm_jax.training.config import TrainConfig

    return to_config_dict(TrainConfig())


def load_recipe(name_or_file: str) -> ml_collections.ConfigDict:
    """Returns what a recipe's `get_config()` returns; a recipe may call this to start from another.

    Raises:
      ConfigError: there is no such recipe, or it fails.
    """
    path = _find_recipe(name_or_file)
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    if spec is None:
        raise ConfigError(f"recipe {path} is not a Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    except ConfigError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"recipe {path} fails with {type(error).__name__}: {reason}") from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise ConfigError(f"get_config() of recipe {path} returns {type(config).__name__}, not an "
                          "ml_collections.ConfigDict")
    return config


def recipe_folder() -> pathlib.Path:
    """Returns `dlm_jax/configs` of an installed package, or `configs` next to the package in a checkout."""
    installed = _PACKAGE / "configs"
    return installed if installed.is_dir() else _PACKAGE.parent / "configs"


def recipe_names() -> list[str]:
    return sorted(path.stem for path in recipe_folder().glob("*.py"))


def _find_recipe(name_or_file: str) -> pathlib.Path:
    path, names = pathlib.Path(name_or_file).expanduser(), recipe_names()
    if name_or_file in names:
        return recipe_folder() / f"{name_or_file}.py"
    if path.is_file():
        return path
    if path.suffix or len(path.parts) > 1:
        siblings = [str(path.with_name(other.name)) for other in path.parent.glob("*.py")]
        raise ConfigError(f"there is no recipe file {name_or_file}{did_you_mean(name_or_file, siblings)}")
    raise ConfigError(f"there is no recipe {name_or_file!r}{did_you_mean(name_or_file, names)}: give the path of a "
                      f"file or one of {', '.join(names)}")


# ---- Between ConfigDicts and dataclasses.


def to_config_dict(config: object) -> ml_collections.ConfigDict:
    """Returns the ConfigDict that mirrors a dataclass. It accepts any key and value; `build_config` checks both."""
    content = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return ml_collections.ConfigDict(
        {name: to_config_dict(value) if dataclasses.is_dataclass(value) else value for name, value in content.items()},
        type_safe=False)


def build_config(cls: type[Config], recipe: ml_collections.ConfigDict,
                 overrides: Iterable[tuple[str, str]] = ()) -> Config:
    """Returns `cls` with the values of `overrides` ((dotted key, text) pairs), else of `recipe`, else its defaults.

    Raises:
      ConfigError: a key is unknown, a value has the wrong type, or `cls` refuses the combination.
    """
    recipe = copy.deepcopy(recipe)
    for key, text in overrides:
        _set(recipe, key, _checked(parse_value, text, _annotation(cls, key), key))
    return _from_mapping(cls, recipe, cls)


def describe_config(config: object) -> list[str]:
    """Returns one line per key: how to set its present value, its help, and the type it accepts."""
    rows = [(f"--config.{key}={format_value(value)}", f"{field.metadata['help']} [{type_name(kind)}]")
            for key, value, field, kind in _leaves(config)]
    width = min(max(len(setting) for setting, _ in rows), 50)
    return [f"{setting:<{width}}  {help_text}" for setting, help_text in rows]


def _set(recipe: ml_collections.ConfigDict, key: str, value: Any) -> None:
    # On the ConfigDict, not on the dataclass built from it, so that keys that refer to this one follow it.
    *groups, name = key.split(".")
    with recipe.unlocked(), recipe.ignore_type():  # a recipe made from scratch may be strict
        for depth, group in enumerate(groups):
            if group not in recipe:
                recipe[group] = ml_collections.ConfigDict()
            recipe = recipe[group]
            if not isinstance(recipe, ml_collections.ConfigDict):
                raise ConfigError(f"config.{'.'.join(groups[:depth + 1])} is a group of keys, not {recipe!r}")
        recipe[name] = value


def _from_mapping(cls: type[Config], content: Mapping[str, Any] | ml_collections.ConfigDict, root: type,
                  prefix: str = "") -> Config:
    kinds, fields = _annotations(cls), {}
    for name, value in content.items():
        key = prefix + name
        if name not in kinds:
            raise _unknown_key(root, key)
        if not dataclasses.is_dataclass(kinds[name]):
            fields[name] = _checked(check_value, value, kinds[name], key)
        elif isinstance(value, Mapping | ml_collections.ConfigDict):
            fields[name] = _from_mapping(kinds[name], value, root, f"{key}.")
        else:
            raise ConfigError(f"config.{key} is a group of keys, not {value!r}")
    return cls(**fields)


def _annotations(cls: type) -> dict[str, Any]:
    """Returns field name -> resolved annotation."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _leaves(config: object, prefix: str = "") -> Iterator[tuple[str, Any, dataclasses.Field, Any]]:
    """Yields (dotted key, value, field, annotation) of every leaf."""
    for field, kind in zip(dataclasses.fields(config), _annotations(type(config)).values(), strict=True):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _leaves(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, value, field, kind


def _annotation(cls: type, key: str) -> Any:
    kind: Any = cls
    for name in key.split("."):
        kinds = _annotations(kind) if dataclasses.is_dataclass(kind) else {}
        if name not in kinds:
            raise _unknown_key(cls, key)
        kind = kinds[name]
    if dataclasses.is_dataclass(kind):
        keys = ", ".join(f"config.{key}.{name}" for name in _annotations(kind))
        raise ConfigError(f"config.{key} is a group of keys: {keys}")
    return kind


def _unknown_key(cls: type, key: str) -> ConfigError:
    from dlm_jax.training.config import OLD_KEYS

    if key in OLD_KEYS:
        return ConfigError(f"config.{key} is now config.{OLD_KEYS[key]}; write that instead")
    keys = [leaf for leaf, *_ in _leaves(cls())]
    groups = {leaf.rpartition(".")[0] for leaf in keys} - {""}
    # The most common slip is a key without its group, or in another group.
    same_name = [leaf for leaf in keys if leaf.split(".")[-1] == key.split(".")[-1]]
    hint = did_you_mean(same_name[0] if same_name else key, [*keys, *groups], prefix="config.")
    return ConfigError(f"there is no key config.{key}{hint or ' (--print_config lists all keys)'}")


def _checked(convert: Callable[[Any, Any], Any], value: Any, kind: Any, key: str) -> Any:
    try:
        return convert(value, kind)
    except InvalidValue as error:
        from dlm_jax.training.config import OLD_VALUES

        choices = map(str, typing.get_args(kind)) if typing.get_origin(kind) is Literal else ()
        new = OLD_VALUES.get(key, {}).get(str(value))
        hint = f"; {value} is now {new}" if new else did_you_mean(str(value), choices)
        raise ConfigError(f"config.{key} takes {type_name(kind)}, not {value!r}{hint}") from error


# ---- Values against the annotations of dataclass fields.

_UNIONS = (Union, types.UnionType)
_WORDS = {"none": None, "true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
_TYPE_NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "text", types.NoneType: "none"}


class InvalidValue(ValueError):
    """The value does not have the type asked for."""


def parse_value(text: str, kind: Any) -> Any:
    """Returns command-line text as a value of the annotation `kind`: `none`, `1e6`, `a,b,c`, `((0,0.5,1),)`.

    Raises:
      InvalidValue: no reading of the text has that type.
    """
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in _UNIONS:
        return _first_valid(parse_value, text, inner)
    if origin is tuple and inner[-1] is Ellipsis and not text.strip().startswith(("(", "[")):
        return tuple(parse_value(item, inner[0]) for item in text.split(",") if item)
    for value in [text] if kind is str else _readings(text):
        with contextlib.suppress(InvalidValue):
            return check_value(value, kind)
    raise InvalidValue


def check_value(value: Any, kind: Any) -> Any:
    """Returns `value` as one of `kind`; integers pass for numbers and lists for tuples, nothing else converts.

    Raises:
      InvalidValue: it has another type.
    """
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in _UNIONS:
        return _first_valid(check_value, value, inner)
    if origin is tuple:
        if isinstance(value, list | tuple):
            kinds = inner[:1] * len(value) if inner[-1] is Ellipsis else inner
            if len(kinds) == len(value):
                return tuple(map(check_value, value, kinds))
        raise InvalidValue
    if kind is float and type(value) is int:
        return float(value)
    if origin is Literal:
        valid = any(value == choice and type(value) is type(choice) for choice in inner)
    else:
        valid = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    if not valid:
        raise InvalidValue
    return value


def type_name(kind: Any) -> str:
    """Returns `kind` in words: "an integer or none"."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in _UNIONS:
        return " or ".join(map(type_name, inner))
    if origin is Literal:
        return "one of " + ", ".join(map(str, inner))
    if origin is tuple and inner[-1] is Ellipsis:
        return f"a list of {type_name(inner[0]).removeprefix('an ').removeprefix('a ')}"
    if origin is tuple:
        return f"({', '.join(map(type_name, inner))})"
    return _TYPE_NAMES[kind]


def format_value(value: Any) -> str:
    """Returns `value` as typed on a command line."""
    if isinstance(value, tuple) and not any(isinstance(item, tuple) for item in value):
        return ",".join(map(format_value, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _readings(text: str) -> Iterator[Any]:
    """Yields the Python values that `text` can mean."""
    if text.lower() in _WORDS:
        yield _WORDS[text.lower()]
    with contextlib.suppress(ValueError, SyntaxError):
        yield ast.literal_eval(text.strip())
    with contextlib.suppress(ValueError):
        number = float(text)
        if number.is_integer():
            yield int(number)  # 1e6 is an integer too
        if number == number:
            yield number
    yield text


def _first_valid(convert: Callable[[Any, Any], Any], value: Any, kinds: Iterable[Any]) -> Any:
    for kind in sorted(kinds, key=lambda kind: kind is str):  # any text is valid text, so that comes last
        with contextlib.suppress(InvalidValue):
            return convert(value, kind)
    raise InvalidValue
