"""The loop over blocks against `jax.lax.ragged_dot`, with gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_jax.models import grouped
from dlm_jax.models.grouped import grouped_matmul, multiply_by_blocks

ROWS, MATRICES, INPUTS, OUTPUTS = 40, 5, 6, 7
RNG = np.random.default_rng(0)
X = RNG.normal(size=(ROWS, INPUTS)).astype(np.float32)
W = RNG.normal(size=(MATRICES, INPUTS, OUTPUTS)).astype(np.float32)
G = RNG.normal(size=(ROWS, OUTPUTS)).astype(np.float32)


def values(multiply, sizes):
    """The results of rows that have a matrix, and the gradients."""
    own = np.arange(ROWS)[:, None] < sum(sizes)

    def loss(x, w):
        out = jnp.where(own, multiply(x, w, jnp.array(sizes)), 0)
        return jnp.sum(out * G), out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(X, W)
    return out, *gradients


@pytest.mark.parametrize("block", [1, 4, 16, 256])
@pytest.mark.parametrize("sizes", [(8, 8, 8, 8, 8), (0, 37, 0, 1, 2), (40, 0, 0, 0, 0), (3, 0, 10, 5, 0), (0,) * 5])
def test_as_ragged_dot(sizes, block, monkeypatch):
    monkeypatch.setattr(grouped, "_BLOCK", block)
    # A program per block: what is traced is remembered by function.
    for found, expected in zip(values(functools.partial(multiply_by_blocks), sizes),
                               values(jax.lax.ragged_dot, sizes), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_each_platform_has_its_own():
    shapes = (jax.ShapeDtypeStruct(array.shape, array.dtype) for array in (X, W, np.zeros(MATRICES, np.int32)))
    traced = jax.jit(grouped_matmul).trace(*shapes)
    text = {platform: traced.lower(lowering_platforms=(platform,)).as_text() for platform in ("cpu", "cuda", "tpu")}
    assert {name for name, lowered in text.items() if "ragged_dot" in lowered} == {"tpu"}
