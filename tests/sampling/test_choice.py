import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_jax.sampling import SamplerConfig
from dlm_jax.sampling.tokens import categorical, choose, invert, keep_largest
from tests.sampling.toys import truncated


def weights_of(seed, size=700, spread=3.0):
    return jax.nn.softmax(spread * jax.random.normal(jax.random.key(seed), (size,)))


@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.9, 0.999])
def test_top_p_keeps_the_smallest_set_that_reaches_it_and_so_the_token_that_crosses(top_p):
    for seed in range(5):
        weights = weights_of(seed)
        kept = np.asarray(keep_largest(weights, weights, top_p)) > 0
        np.testing.assert_array_equal(kept, truncated(np.asarray(weights, np.float64), top_p=top_p) > 0)
        assert weights[kept].sum() >= top_p > weights[kept].sum() - weights[kept].min()


@pytest.mark.parametrize("k", [1, 7, 699])
def test_top_k_keeps_k(k):
    weights = weights_of(0)
    kept = np.asarray(keep_largest(weights, jnp.ones_like(weights), k)) > 0
    assert set(np.flatnonzero(kept)) == set(np.argsort(-np.asarray(weights))[:k])


def test_equals_of_the_crossing_token_are_kept():
    weights = jnp.array([0.4, 0.2, 0.2, 0.2])
    np.testing.assert_array_equal(keep_largest(weights, weights, 0.5) > 0, [True] * 4)
    np.testing.assert_array_equal(keep_largest(weights, weights, 0.4) > 0, [True, False, False, False])


def test_inverting_gives_each_token_its_share():
    weights = np.random.default_rng(0).dirichlet(np.full(50, 0.2)).astype(np.float32)
    weights[[0, 7, 49]] = 0
    step_schedule = jnp.arange(1 << 18) / (1 << 18)
    share = np.bincount(jax.vmap(invert, (None, 0))(weights, step_schedule), minlength=50) / (1 << 18)
    np.testing.assert_allclose(share, weights / weights.sum(), atol=2 / (1 << 18))
    assert (share[[0, 7, 49]] == 0).all()


def test_the_tail_is_drawn_as_often_as_it_should():
    """600 tokens of e^-14 each against one of 1: float32 Gumbel noise would be near its ceiling."""
    logits = jnp.full(601, -14.0).at[0].set(0.0)
    keys = jax.random.split(jax.random.key(0), 1 << 18)
    drawn = jax.lax.map(lambda key: categorical(jax.nn.softmax(logits), key), keys, batch_size=4096)
    expected = keys.size * 600 * np.exp(-14.0)
    assert abs(int((drawn > 0).sum()) - expected) < 4 * expected**0.5


def test_choose_at_temperature_zero_is_argmax_and_forbidden_tokens_never_come():
    logits = jnp.array([-jnp.inf, 1.0, 2.0, -jnp.inf])
    assert choose(logits, jax.random.key(0), SamplerConfig(temperature=0.0)) == 2
    keys = jax.random.split(jax.random.key(0), 2000)
    for config in (SamplerConfig(), SamplerConfig(top_p=0.99), SamplerConfig(top_k=3, temperature=2.0)):
        drawn = jax.vmap(lambda key, config=config: choose(logits, key, config))(keys)
        assert set(np.unique(drawn)) == {1, 2}


def test_choose_follows_temperature_top_k_and_top_p_together():
    logits = jnp.log(weights_of(3, size=12, spread=1.0))
    config = SamplerConfig(temperature=1.5, top_k=6, top_p=0.8)
    keys = jax.random.split(jax.random.key(1), 40_000)
    share = np.bincount(jax.vmap(lambda key: choose(logits, key, config))(keys), minlength=12) / 40_000
    expected = truncated(np.exp(np.asarray(logits, np.float64)), temperature=1.5, top_k=6, top_p=0.8)
    np.testing.assert_allclose(share, expected, atol=4 * (0.25 / 40_000) ** 0.5)
    np.testing.assert_array_equal(share > 0, expected > 0)
