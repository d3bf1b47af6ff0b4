"""Fields with help texts, and checks whose errors name the key."""

import dataclasses
import math
from typing import Literal

import pytest

from dlm_jax import config_fields
from dlm_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Example:
    kind: Literal["a", "b"] = config_fields.field("a", "one of two")


def test_field_has_default_and_help():
    field, = dataclasses.fields(Example)
    assert field.default == "a" and field.metadata["help"] == "one of two"


def test_choices():
    config_fields.check_choices(Example("b"), "group")
    with pytest.raises(ConfigError, match=r"group\.kind"):
        config_fields.check_choices(Example("c"), "group")
    with pytest.raises(ConfigError, match="^kind"):
        config_fields.check_choices(Example("c"))


@pytest.mark.parametrize(("value", "open_low", "open_high", "is_valid"), [
    (0, False, False, True), (0, True, False, False), (1, False, False, True), (1, False, True, False),
    (-0.1, False, False, False), (1.1, False, False, False), (0.5, True, True, True), (math.nan, False, False, False)])
def test_range(value, open_low, open_high, is_valid):
    def check() -> None:
        config_fields.check_range(value, 0, 1, "group.key", open_low=open_low, open_high=open_high)

    if is_valid:
        check()
    else:
        with pytest.raises(ConfigError, match=r"group\.key"):
            check()


def test_at_least():
    config_fields.check_at_least(1, 1, "group.key")
    with pytest.raises(ConfigError, match=r"group\.key must be at least 1"):
        config_fields.check_at_least(0, 1, "group.key")
