"""A fixture for tests of many rows."""

import functools

import jax
import pytest

from dlm_jax.sampling import sampler


@functools.cache
def _optimized():
    return jax.jit(sampler._sample.__wrapped__, static_argnames=("graphdef", "spec"),
                   compiler_options={"xla_backend_optimization_level": 1})


@pytest.fixture
def optimized_program(monkeypatch):
    """Optimizes the sampling program: with thousands of rows, that costs less than running it unoptimized."""
    monkeypatch.setattr(sampler, "_sample", _optimized())
