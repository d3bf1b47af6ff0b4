import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dlm_jax.sampling.policies import quota, random_plan, token_probability


@pytest.mark.parametrize("num_steps", [2, 7])
def test_the_random_plan_is_the_release_s_loop_drawn_at_once(num_steps):
    plans = jax.vmap(lambda key: random_plan(key, jnp.ones(40, bool), num_steps))(
        jax.random.split(jax.random.key(0), 500))
    # The loop: at forward s of T a masked token is revealed with probability 1/(t+1), t = T-1-s; the last takes all.
    still, law = 1.0, []
    for t in range(num_steps - 1, -1, -1):
        law.append(still / (t + 1))
        still -= law[-1]
    counts = np.bincount(np.asarray(plans).ravel(), minlength=num_steps)
    assert stats.chisquare(counts, np.array(law) * plans.size).pvalue > 1e-4
    pairs = np.bincount(np.asarray(plans[:, ::2] * num_steps + plans[:, 1::2]).ravel(), minlength=num_steps**2)
    assert stats.chisquare(pairs, np.outer(law, law).ravel() * plans.size / 2).pvalue > 1e-4


def test_padding_does_not_change_the_plan():
    key = jax.random.key(3)
    np.testing.assert_array_equal(random_plan(key, jnp.ones(64, bool), 9)[:37], random_plan(key, jnp.ones(37, bool), 9))


@pytest.mark.parametrize("num_steps", [1, 2, 7, 16, 64])
def test_quotas_are_even_and_complete(num_steps):
    total = np.arange(40)[:, None]
    counts = np.asarray(quota(np.arange(num_steps), total, num_steps))
    for n, row in enumerate(counts):
        used = row[: min(n, num_steps)]
        assert used.sum() == n
        assert n == 0 or used.min() >= max(1, used.max() - 1)


def test_confidence_is_the_log_probability_of_the_candidate():
    logits = jnp.array([[0.0, 1.0, -jnp.inf]])
    np.testing.assert_allclose(token_probability(logits, jnp.array([1])), [1 - np.log(1 + np.e)], rtol=1e-6)
