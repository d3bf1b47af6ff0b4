import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_jax.sampling import POLICIES, SamplerConfig
from dlm_jax.sampling.config import margin, negative_entropy, probability
from dlm_jax.sampling.tokens import slice_size


def test_scores_are_what_they_are_called():
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.full(9, 0.5), (4, 5))
    token = rng.integers(0, 9, (4, 5))
    logits = jnp.asarray(np.log(p) + 3, jnp.float32)
    np.testing.assert_allclose(probability(logits, token), np.log(np.take_along_axis(p, token[..., None], -1)[..., 0]),
                               rtol=1e-4, atol=1e-5)
    largest = np.sort(p)
    np.testing.assert_allclose(margin(logits, token), largest[..., -1] - largest[..., -2], atol=1e-6)
    np.testing.assert_allclose(negative_entropy(logits, token), (p * np.log(p)).sum(-1), atol=1e-5)


def test_a_forbidden_token_counts_for_nothing():
    logits, token = jnp.array([[0.0, 1.0, -jnp.inf]]), jnp.array([1])
    p = np.exp([0, 1]) / np.exp([0, 1]).sum()
    np.testing.assert_allclose(probability(logits, token), [np.log(p[1])], rtol=1e-6)
    np.testing.assert_allclose(margin(logits, token), [p[1] - p[0]], rtol=1e-6)
    np.testing.assert_allclose(negative_entropy(logits, token), [(p * np.log(p)).sum()], rtol=1e-6)


def test_where_one_token_is_possible_every_score_is_at_its_best():
    logits, token = jnp.full((1, 5), -jnp.inf).at[0, 2].set(4.0), jnp.array([2])
    assert [float(score(logits, token)[0]) for score in (probability, margin, negative_entropy)] == [0.0, 1.0, 0.0]


@pytest.mark.parametrize("policy", POLICIES)
def test_the_head_takes_at_least_one_position_and_at_most_all(policy):
    for batch in (1, 3, 64, 20_000):
        for width in (1, 4, 9, 64, 2048):
            assert 1 <= slice_size(SamplerConfig(policy), batch, width) <= width


def test_scores_keep_the_shape_of_the_candidates():
    logits = jax.random.normal(jax.random.key(0), (2, 3, 7))
    for score in (probability, margin, negative_entropy):
        assert score(logits, jnp.zeros((2, 3), jnp.int32)).shape == (2, 3)
