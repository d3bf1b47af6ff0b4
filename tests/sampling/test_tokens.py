import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dlm_jax.sampling import POLICIES, SamplerConfig
from dlm_jax.sampling.spec import NO_DRAFT, RowSettings
from dlm_jax.sampling.tokens import (
    accept_or_resample,
    categorical,
    invert_cdf,
    keep_largest,
    sample_token,
    slice_size,
    token_probs,
)
from tests.sampling.enumerated import truncated

jitted_keep_largest = jax.jit(keep_largest)


def random_weights(seed, size=700, spread=3.0):
    return jax.nn.softmax(spread * jax.random.normal(jax.random.key(seed), (size,)))


def row_settings(**settings):
    return RowSettings.of(SamplerConfig(**settings), 1)


def sample_tokens_of(logits, keys, **settings):
    """Returns a token for each key, of logits [vocab]."""
    many = jnp.broadcast_to(logits, (1, len(keys), len(logits)))
    return np.asarray(jax.jit(sample_token)(many, keys[None], row_settings(**settings))[0])


@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.9, 0.999])
def test_top_p_keeps_smallest_set_that_reaches_it(top_p):
    for seed in range(5):
        weights = random_weights(seed)
        kept = np.asarray(jitted_keep_largest(weights, weights, top_p)) > 0
        np.testing.assert_array_equal(kept, truncated(np.asarray(weights, np.float64), top_p=top_p) > 0)
        assert weights[kept].sum() >= top_p > weights[kept].sum() - weights[kept].min()


@pytest.mark.parametrize("k", [1, 7, 699])
def test_top_k_keeps_k(k):
    weights = random_weights(0)
    kept = np.asarray(jitted_keep_largest(weights, jnp.ones_like(weights), k)) > 0
    assert set(np.flatnonzero(kept)) == set(np.argsort(-np.asarray(weights))[:k])


def test_equals_of_crossing_token_are_kept():
    weights = jnp.array([0.4, 0.2, 0.2, 0.2])
    np.testing.assert_array_equal(keep_largest(weights, weights, 0.5) > 0, [True] * 4)
    np.testing.assert_array_equal(keep_largest(weights, weights, 0.4) > 0, [True, False, False, False])


def test_invert_cdf_gives_each_token_its_share():
    weights = np.random.default_rng(0).dirichlet(np.full(50, 0.2)).astype(np.float32)
    weights[[0, 7, 49]] = 0
    uniform = jnp.arange(1 << 18) / (1 << 18)
    share = np.bincount(jax.vmap(invert_cdf, (None, 0))(weights, uniform), minlength=50) / (1 << 18)
    np.testing.assert_allclose(share, weights / weights.sum(), atol=2 / (1 << 18))
    assert (share[[0, 7, 49]] == 0).all()


def test_categorical_samples_rare_tokens_often_enough():
    """2,400 tokens of e^-14 each against one of 1: float32 Gumbel noise would be near its maximum."""
    weights = jax.nn.softmax(jnp.full(2401, -14.0).at[0].set(0.0))
    keys = jax.random.split(jax.random.key(0), 1 << 16)
    tokens = jax.lax.map(functools.partial(categorical, weights), keys, batch_size=4096)
    expected = keys.size * 2400 * np.exp(-14.0)
    assert abs(int((tokens > 0).sum()) - expected) < 4 * expected**0.5


def test_argmax_at_temperature_zero_and_no_excluded_token():
    logits = jnp.array([-jnp.inf, 1.0, 2.0, -jnp.inf])
    keys = jax.random.split(jax.random.key(0), 500)
    assert set(np.unique(sample_tokens_of(logits, keys, temperature=0.0))) == {2}
    for settings in (dict(), dict(top_p=0.99), dict(top_k=3, temperature=2.0)):
        assert set(np.unique(sample_tokens_of(logits, keys, **settings))) == {1, 2}


def test_rows_of_a_batch_may_differ_in_their_settings():
    """Each row samples what a batch of its own would; neutral numbers change nothing."""
    settings = [dict(temperature=0.0), dict(temperature=0.5), dict(top_k=2), dict(top_p=0.6), dict()]
    configs = [SamplerConfig(**one) for one in settings]
    together = RowSettings(
        temperature=jnp.array([config.temperature for config in configs], jnp.float32),
        top_p=jnp.array([config.top_p or 1 for config in configs]),
        top_k=jnp.array([config.top_k or 1 << 30 for config in configs], jnp.int32))
    logits = jnp.log(random_weights(5, size=12, spread=1.0))
    keys = jax.random.split(jax.random.key(0), 300)
    batch = jnp.broadcast_to(logits, (len(configs), 300, 12)), jnp.tile(keys, (len(configs), 1))
    found = jax.jit(sample_token)(*batch, together)
    for row, one in zip(found, settings, strict=True):
        np.testing.assert_array_equal(row, sample_tokens_of(logits, keys, **one))
    probs = token_probs(batch[0], together)
    for row, config in zip(probs, configs, strict=True):
        np.testing.assert_allclose(row[:1], token_probs(logits[None, None], RowSettings.of(config, 1))[0], rtol=1e-6)


def test_temperature_top_k_and_top_p_together():
    logits = jnp.log(random_weights(3, size=12, spread=1.0))
    keys = jax.random.split(jax.random.key(1), 10_000)
    tokens = sample_tokens_of(logits, keys, temperature=1.5, top_k=6, top_p=0.8)
    share = np.bincount(tokens, minlength=12) / 10_000
    expected = truncated(np.exp(np.asarray(logits, np.float64)), temperature=1.5, top_k=6, top_p=0.8)
    np.testing.assert_allclose(share, expected, atol=4 * (0.25 / 10_000) ** 0.5)
    np.testing.assert_array_equal(share > 0, expected > 0)


@jax.jit
def propose_and_accept(logits, q, keys, settings):
    """Returns 20,000 samples of q, and what is made of them."""
    draft_keys, keys = (jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(20_000)) for key in keys)
    drafts = jax.vmap(functools.partial(categorical, q))(draft_keys)
    many = jnp.broadcast_to(logits, (1, 20_000, len(logits))), jnp.broadcast_to(q, (1, 20_000, len(q)))
    return drafts, accept_or_resample(many[0], drafts[None], many[1], keys[None], settings)[0]


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(1.0, 8, 0.8), (2.0, 4, 1.0), (0.0, 8, 1.0)])
def test_accepted_drafts_leave_the_distribution_as_it_is(temperature, top_k, top_p):
    """The law is the model's, and a draft is taken with probability sum min(p, q), the most that is possible."""
    settings = RowSettings(temperature=jnp.array([temperature]), top_k=jnp.array([top_k]), top_p=jnp.array([top_p]))
    logits = jnp.array([1.5, 0.3, -0.2, 0.9, -1.0, 0.0, 0.4, -jnp.inf])
    p, keys = token_probs(logits[None, None], settings)[0, 0], jax.random.split(jax.random.key(0))
    for shift in (0.0, 0.4, 3.0):  # a perfect drafter, one that is near, and one that is far
        q = token_probs((logits + shift * jnp.arange(8))[None, None], settings)[0, 0]
        drafts, tokens = propose_and_accept(logits, q, keys, settings)
        check_law(tokens, p)
        rate = float(jnp.minimum(p, q).sum())
        assert abs(np.mean(drafts == tokens) - rate) < 4.5 * np.sqrt(rate * (1 - rate) / len(tokens)) + 1e-5


def test_without_a_draft_it_is_plain_sampling():
    settings, logits = row_settings(temperature=0.7), jnp.tile(jnp.array([1.5, 0.3, -0.2, 0.9]), (1, 5, 1))
    keys = jax.random.split(jax.random.key(0), (1, 5))
    found = jax.jit(accept_or_resample)(logits, jnp.full((1, 5), NO_DRAFT), jnp.zeros((1, 5, 4)), keys, settings)
    np.testing.assert_array_equal(found, jax.jit(sample_token)(logits, keys, settings))


def check_law(tokens, p):
    counts, expected = np.bincount(tokens, minlength=len(p)), len(tokens) * np.asarray(p, np.float64)
    kept = expected > 0
    assert not counts[~kept].any()
    assert ((counts - expected)[kept] ** 2 / expected[kept]).sum() < stats.chi2.ppf(1 - 1e-4, max(kept.sum() - 1, 1))


@pytest.mark.parametrize("policy", POLICIES)
def test_slice_size_is_between_one_and_width(policy):
    for batch in (1, 3, 64, 20_000):
        for width in (1, 4, 9, 64, 2048):
            assert 1 <= slice_size(SamplerConfig(policy), batch, width, 4 * width) <= width
