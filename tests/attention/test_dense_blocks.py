"""Attention in blocks is that of the whole square, which evaluates the same mask."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_jax.attention import AttentionMask, xla_attention
from dlm_jax.attention.xla import xla_block_attention

TEXT = 10
SEGMENTS = np.array([[0] * 3 + [1] * 7, [0] * 6 + [1] * 4])


def mask_of(size, views, segments, window, bidirectional_clean):
    mask = AttentionMask.block_diffusion(size, TEXT, views, bidirectional_clean=bidirectional_clean).with_window(window)
    return mask.with_segments(SEGMENTS) if segments else mask


@pytest.mark.parametrize("size, views, segments, window, bidirectional_clean, dropout", [
    (1, 1, False, None, False, 0.0), (3, 1, False, None, True, 0.3), (5, 2, True, None, False, 0.0),
    (4, 1, True, 3, True, 0.3), (TEXT, 1, False, None, False, 0.0), (64, 2, False, 6, False, 0.0)])
def test_matches_the_whole_square(size, views, segments, window, bidirectional_clean, dropout):
    rng, mask = np.random.default_rng(0), mask_of(size, views, segments, window, bidirectional_clean)
    query, key, value, weights = (jnp.asarray(rng.normal(size=(2, TEXT * (views + 1), heads, 8)), jnp.float32)
                                  for heads in (4, 2, 2, 4))

    def values(attention):
        def loss(*tensors):
            out = attention(*tensors, mask, dropout_rate=dropout, dropout_seeds=jnp.array([3, 9], jnp.uint32))
            return jnp.sum(out * weights), out
        return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(query, key, value)

    close = functools.partial(np.testing.assert_allclose, atol=2e-6, rtol=1e-5)
    jax.tree.map(close, values(xla_block_attention), values(xla_attention))
