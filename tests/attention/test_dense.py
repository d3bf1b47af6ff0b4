import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_jax.attention import AttentionMask, attend
from dlm_jax.errors import ConfigError
from dlm_jax.random import dropout


def inputs(batch=2, length=13, heads=4, kv_heads=2, head_dim=8, dtype=np.float32):
    rng = np.random.default_rng(0)
    shape = lambda h: (batch, length, h, head_dim)  # noqa: E731
    return tuple(jnp.asarray(rng.normal(size=shape(h)), dtype) for h in (heads, kv_heads, kv_heads))


def naive(query, key, value, allowed):
    """One head and one query at a time, in float64."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    batch, length, heads, head_dim = query.shape
    out = np.zeros_like(query)
    for b in range(batch):
        for h in range(heads):
            kv = h // (heads // key.shape[2])
            for i in range(length):
                sees = np.flatnonzero(allowed[b % len(allowed), i])
                scores = key[b, sees, kv] @ query[b, i, h] / np.sqrt(head_dim)
                p = np.exp(scores - scores.max())
                out[b, i, h] = p / p.sum() @ value[b, sees, kv]
    return out


SEGMENTS = jnp.repeat(jnp.arange(2), jnp.array([5, 8]))[None].repeat(2, 0)
MASKS = {
    "causal": AttentionMask.causal(),
    "bidirectional": AttentionMask.bidirectional(),
    "annealed": AttentionMask.annealed(0.4, 3, jnp.arange(2)),
    "block_causal": AttentionMask.block_causal(4),
    "segments": AttentionMask.bidirectional().with_segments(SEGMENTS),
    "lengths": AttentionMask.bidirectional().with_lengths(jnp.array([13, 6])),
    "window": AttentionMask.causal().with_window(3),
}


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_matches_the_definition(mask, kv_heads):
    query, key, value = inputs(kv_heads=kv_heads)
    allowed = np.asarray(mask.allowed(jnp.arange(13), jnp.arange(13)))
    np.testing.assert_allclose(attend(query, key, value, mask), naive(query, key, value, allowed), atol=2e-6)


def test_bfloat16_keeps_its_type_and_a_float32_softmax():
    query, key, value = inputs(dtype=jnp.bfloat16)
    out = attend(query, key, value, AttentionMask.causal())
    assert out.dtype == jnp.bfloat16
    allowed = np.tril(np.ones((1, 13, 13), bool))
    np.testing.assert_allclose(out.astype(np.float32), naive(query, key, value, allowed), atol=0.03)


def test_a_query_that_sees_nothing_stays_finite():
    query, key, value = inputs()
    mask = AttentionMask.matrix(jnp.zeros((13, 13), bool))
    loss = lambda q: jnp.sum(attend(q, key, value, mask) ** 2)  # noqa: E731
    assert np.isfinite(jax.grad(loss)(query)).all()


def test_dropout_drops_its_share_and_keeps_the_mean():
    x = jnp.ones((4, 64, 64))
    y = np.asarray(dropout(x, 0.25, jnp.arange(4, dtype=jnp.uint32)))
    assert abs((y == 0).mean() - 0.25) < 0.01 and abs(y.mean() - 1) < 0.02
    assert set(np.unique(y)) == {0.0, np.float32(1 / 0.75)}


def test_dropout_follows_the_example_not_its_place():
    query, key, value = inputs()
    run = lambda rows, seeds: attend(query[rows], key[rows], value[rows], AttentionMask.causal(),  # noqa: E731
                                     dropout_rate=0.5, dropout_seeds=jnp.asarray(seeds, jnp.uint32))
    both, second = run(np.array([0, 1]), [3, 9]), run(np.array([1]), [9])
    np.testing.assert_allclose(both[1], second[0], atol=1e-6)
    assert (np.asarray(run(np.array([1]), [4])) != np.asarray(second)).any()


def test_an_unknown_backend_is_refused():
    with pytest.raises(ConfigError, match="unknown attention backend 'flash3'"):
        attend(*inputs(), AttentionMask.causal(), backend="flash3")
