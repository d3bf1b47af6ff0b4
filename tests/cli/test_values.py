"""Text and Python values against annotations."""

from typing import Literal

import pytest

from dlm_jax.cli import values

SAYS = [
    (int, "12", 12), (int, "-3", -3), (int, "1_000", 1000), (int, "1e6", 1_000_000),
    (float, "3", 3.0), (float, "1e-4", 1e-4), (float, "inf", float("inf")),
    (bool, "true", True), (bool, "False", False), (bool, "0", False),
    (str, "a,b=c", "a,b=c"), (str, "", ""),
    (Literal["x", "y"], "y", "y"), (Literal[1, 2], "2", 2),
    (int | str | None, "10541", 10541), (int | str | None, "<mask>", "<mask>"), (int | str | None, "none", None),
    (float | None, "0.5", 0.5), (bool | None, "None", None),
    (tuple[str, ...], "", ()), (tuple[str, ...], "a*.txt,b.txt", ("a*.txt", "b.txt")),
    (tuple[str, ...], "('a,b',)", ("a,b",)), (tuple[int, ...], "1,2", (1, 2)),
    (tuple[int, float], "(1, 2)", (1, 2.0)),
    (tuple[tuple[int, float, float], ...], "((0, 0.5, 1), (9, 0, 1))", ((0, 0.5, 1.0), (9, 0.0, 1.0))),
]
REFUSED = [
    (int, "1.5"), (int, "one"), (int, ""), (int, "1e400"), (int, "nan"), (float, "x"), (float, "nan"), (bool, "maybe"),
    (bool, "2"),
    (Literal["x", "y"], "z"), (Literal[1, 2], "3"), (int | None, "x"), (tuple[int, ...], "1,x"),
    (tuple[int, float], "(1,)"), (tuple[int, float], "1"), (tuple[str, ...], "('a',"), (tuple[int, ...], "(1, True)"),
]


@pytest.mark.parametrize(("kind", "text", "value"), SAYS)
def test_text_is_read_as_its_kind(kind, text, value):
    found = values.read(text, kind)
    assert found == value and type(found) is type(value)
    assert values.fit(value, kind) == value
    if "(" not in text:  # what is shown can be typed again
        assert values.read(values.show(value), kind) == value


@pytest.mark.parametrize(("kind", "text"), REFUSED)
def test_text_of_another_kind_is_refused(kind, text):
    with pytest.raises(values.InvalidValue):
        values.read(text, kind)


@pytest.mark.parametrize(("kind", "value"), [
    (int, True), (int, 1.0), (int, "1"), (float, "1"), (float, True), (bool, 1), (str, 1), (str, None), (int, None),
    (Literal[1], True), (tuple[str, ...], "ab"), (tuple[int, int], (1, 2, 3))])
def test_values_do_not_convert_silently(kind, value):
    with pytest.raises(values.InvalidValue):
        values.fit(value, kind)


def test_integers_pass_for_numbers_and_lists_for_tuples():
    assert type(values.fit(3, float)) is float
    assert values.fit([1, 2], tuple[float, ...]) == (1.0, 2.0)


def test_kinds_have_names_for_people():
    assert values.name(int | None) == "an integer or none"
    assert values.name(Literal["a", "b"]) == "one of a, b"
    assert values.name(tuple[str, ...]) == "a list of text"
    assert values.name(tuple[tuple[int, float], ...]) == "a list of (an integer, a number)"
