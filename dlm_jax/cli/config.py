"""From an ml-collections ConfigDict and `--config.key=value` overrides to frozen dataclasses, and back.

The dataclasses own keys, types, defaults and meanings; a ConfigDict is only the form in which people write them.
Every mistake is one sentence that names the key.
"""

import copy
import dataclasses
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import ml_collections

from dlm_jax.cli import values
from dlm_jax.errors import ConfigError

Config = TypeVar("Config")


def to_config_dict(config: object) -> ml_collections.ConfigDict:
    """The ConfigDict that mirrors a dataclass.

    It takes any key and value: `build_config` checks both, against annotations that know more than a default does
    (what a key that is None may become) and in words that name the key.
    """
    content = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return ml_collections.ConfigDict(
        {name: to_config_dict(value) if dataclasses.is_dataclass(value) else value for name, value in content.items()},
        type_safe=False)


def build_config(cls: type[Config], recipe: ml_collections.ConfigDict,
                 overrides: Iterable[tuple[str, str]] = ()) -> Config:
    """`cls` with the values of `overrides` ((dotted key, text) pairs), else of `recipe`, else its own defaults.

    Raises:
      ConfigError: a key is unknown, a value has the wrong type, or `cls` refuses the combination.
    """
    recipe = copy.deepcopy(recipe)
    for key, text in overrides:
        _set(recipe, key, _checked(values.read, text, _kind_of(cls, key), key))
    return _from_mapping(cls, recipe, cls)


def describe_config(config: object) -> list[str]:
    """One line a key: how to set it to what it is, its meaning, and what it accepts."""
    rows = [(f"--config.{key}={values.show(value)}", f"{field.metadata['help']} [{values.name(kind)}]")
            for key, value, field, kind in _leaves(config)]
    width = min(max(len(setting) for setting, _ in rows), 50)
    return [f"{setting:<{width}}  {meaning}" for setting, meaning in rows]


def _set(recipe: ml_collections.ConfigDict, key: str, value: Any) -> None:
    """On the ConfigDict, not on what is built from it, so that keys which refer to this one follow."""
    *groups, name = key.split(".")
    with recipe.unlocked(), recipe.ignore_type():  # a recipe from scratch may be strict
        for depth, group in enumerate(groups):
            if group not in recipe:
                recipe[group] = ml_collections.ConfigDict()
            recipe = recipe[group]
            if not isinstance(recipe, ml_collections.ConfigDict):
                raise ConfigError(f"config.{'.'.join(groups[:depth + 1])} is a group of keys, not {recipe!r}")
        recipe[name] = value


def _kinds(cls: type) -> dict[str, Any]:
    """Name -> annotation of every field."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _leaves(config: object, prefix: str = "") -> Iterator[tuple[str, Any, dataclasses.Field, Any]]:
    """(dotted key, value, field, annotation) of every leaf."""
    for field, kind in zip(dataclasses.fields(config), _kinds(type(config)).values(), strict=True):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _leaves(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, value, field, kind


def _kind_of(cls: type, key: str) -> Any:
    kind: Any = cls
    for part in key.split("."):
        kinds = _kinds(kind) if dataclasses.is_dataclass(kind) else {}
        if part not in kinds:
            raise _unknown(cls, key)
        kind = kinds[part]
    if dataclasses.is_dataclass(kind):
        keys = ", ".join(f"config.{key}.{name}" for name in _kinds(kind))
        raise ConfigError(f"config.{key} is a group of keys: {keys}")
    return kind


def _unknown(cls: type, key: str) -> ConfigError:
    keys = [leaf for leaf, *_ in _leaves(cls())]
    groups = {leaf.rpartition(".")[0] for leaf in keys}
    # A key without its group, or in another one, is the likeliest slip.
    same_name = [leaf for leaf in keys if leaf.split(".")[-1] == key.split(".")[-1]]
    match = same_name[0] if same_name else values.closest(key, [*keys, *groups])
    return ConfigError(f"there is no key config.{key}"
                       + (f" (did you mean config.{match}?)" if match else " (--print_config lists all keys)"))


def _from_mapping(cls: type[Config], content: Mapping[str, Any] | ml_collections.ConfigDict, root: type,
                  prefix: str = "") -> Config:
    kinds = _kinds(cls)
    fields = {}
    for name, value in content.items():
        key = prefix + name
        if name not in kinds:
            raise _unknown(root, key)
        if not dataclasses.is_dataclass(kinds[name]):
            fields[name] = _checked(values.fit, value, kinds[name], key)
        elif isinstance(value, Mapping | ml_collections.ConfigDict):
            fields[name] = _from_mapping(kinds[name], value, root, f"{key}.")
        else:
            raise ConfigError(f"config.{key} is a group of keys, not {value!r}")
    return cls(**fields)


def _checked(convert: Callable[[Any, Any], Any], value: Any, kind: Any, key: str) -> Any:
    try:
        return convert(value, kind)
    except values.InvalidValue as error:
        hint = values.hint(str(value), values.choices(kind))
        raise ConfigError(f"config.{key} takes {values.name(kind)}, not {value!r}{hint}") from error
