"""Runs to load, as in the tests of training."""

from tests.training.conftest import base, config, corpus, pretrained  # noqa: F401
