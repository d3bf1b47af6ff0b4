"""Compiles the sampling programs with few optimizations: compilation is most of the time of these tests."""

import functools

import jax
import pytest

from dlm_jax.sampling import sampler
from tests.compilation import quick


@functools.cache
def _quick(program, level):
    return jax.jit(program.__wrapped__, static_argnames=("graphdef", "spec"), compiler_options=quick(level))


@pytest.fixture(scope="module", autouse=True)
def quick_compilation(request):
    """A module with OPTIMIZATION_LEVEL = 1 runs large batches."""
    level = getattr(request.module, "OPTIMIZATION_LEVEL", 0)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_sample", "_start", "_step"):
            patch.setattr(sampler, name, _quick(getattr(sampler, name), level))
        yield
