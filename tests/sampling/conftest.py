"""Compiling is most of the time here: XLA is told to optimise little."""

import functools

import jax
import pytest

from dlm_jax.sampling import loop
from tests.compilation import quick


@functools.cache
def _quick(program, level):
    return jax.jit(program.__wrapped__, static_argnames=("graphdef", "task"), compiler_options=quick(level))


@pytest.fixture(scope="module", autouse=True)
def quick_compilation(inputs):
    """A module with OPTIMIZATION_LEVEL = 1 is one of large batches."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_sample", "_begin", "_step"):
            level = getattr(inputs.module, "OPTIMIZATION_LEVEL", 0)
            patch.setattr(loop, name, _quick(getattr(loop, name), level))
        yield
