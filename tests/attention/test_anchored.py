import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_jax.attention import AttentionMask, anchored, anchored_attention, xla_attention

TEXT, SIZE = 20, 4
ANCHORS = jnp.array([[3, 9, 19, 12, 1, 0], [7, 7, 2, 15, 10, 18]])
SEGMENTS = jnp.repeat(jnp.array([[0, 1], [5, 5]]), TEXT // 2, axis=1)


@pytest.mark.parametrize("queries", [1024, 8])
@pytest.mark.parametrize("window, causal, segments", [(None, False, None), (6, True, None), (None, True, SEGMENTS)])
def test_equals_the_dense_reference_with_gradients(window, causal, segments, queries, monkeypatch):
    """All blocks at once, and two at a time."""
    monkeypatch.setattr(anchored, "_QUERIES", queries)
    mask = AttentionMask.anchored(TEXT, SIZE, ANCHORS, causal=causal).with_window(window)
    mask = mask if segments is None else mask.with_segments(segments)
    blocks = ANCHORS.shape[1] * SIZE
    query, target = (jax.random.normal(jax.random.key(i), (2, blocks, 4, 8)) for i in (0, 1))
    key, value = (jax.random.normal(jax.random.key(i), (2, TEXT + blocks, 2, 8)) for i in (2, 3))

    def dense(query, key, value):
        return jnp.sum(target * xla_attention(query, key, value, mask, query_positions=TEXT + jnp.arange(blocks)))

    def split(query, key, value):
        text, own = ((key[:, part], value[:, part]) for part in (slice(0, TEXT), slice(TEXT, None)))
        return jnp.sum(target * anchored_attention(query, text, own, mask))

    expected, found = (jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2)))(query, key, value) for f in (dense, split))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-5)
