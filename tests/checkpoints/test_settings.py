"""Checks of settings: what passes, and that an error names file, setting and value."""

import pytest

from dlm_jax.checkpoints.settings import check_implemented, require
from dlm_jax.errors import CheckpointError

EXAMPLES = {
    "a number": (-1.5, 2), "a positive number": (0.5, 2), "an integer": (-1, 0), "a positive integer": (1, 9),
    "true or false": (True, False), "an object": ({}, {"a": 1}), "a list of layers": ([], [1, 2]),
}
WRONG = {
    "a number": (True, "1", None), "a positive number": (0, -1.0, True), "an integer": (1.0, False),
    "a positive integer": (0, True), "true or false": (0, "false", None), "an object": ([], None),
    "a list of layers": ((1,), [1.5], 3),
}  # fmt: skip


@pytest.mark.parametrize("kind", EXAMPLES)
def test_kinds(kind):
    for value in EXAMPLES[kind]:
        assert require(value, "size", kind) is value
    for value in WRONG[kind]:
        with pytest.raises(CheckpointError) as caught:
            require(value, "size", kind, "x.json")
        assert all(text in str(caught.value) for text in ("x.json", "size", kind, repr(value)))


def test_implemented_values():
    implemented = {"bias": ("none", None), "scale": (1,)}
    for settings in ({}, {"bias": None}, {"bias": "none", "scale": 1.0, "other": 3}):
        check_implemented(settings, implemented)
    with pytest.raises(CheckpointError) as caught:
        check_implemented({"bias": "all"}, implemented, "x.json", "; remove it")
    assert all(text in str(caught.value) for text in ("x.json", "bias", "'all'", "'none'", "remove it"))
