import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_jax.diffusion import (
    HeadPlan,
    LossSums,
    NoiseSchedule,
    clean_batch,
    corrupt,
    example_keys,
    loss_sums,
    token_nll,
)
from dlm_jax.diffusion.corruption import NoisyBatch

B, L, D, V, MASK = 3, 21, 8, 17, 16
KEYS = jax.random.split(jax.random.key(0), 3)
HIDDEN = jax.random.normal(KEYS[0], (B, L, D))
KERNEL = jax.random.normal(KEYS[1], (D, V))
TOKENS = jax.random.randint(KEYS[2], (B, L), 0, V)  # genuine occurrences of MASK included
PLAN = HeadPlan(1)
MASKABLE = jnp.ones((B, L), bool).at[:, 0].set(False)


def unembed(hidden):
    return hidden @ KERNEL


def naive_nll(shift):
    logp = np.asarray(jax.nn.log_softmax(unembed(HIDDEN)), np.float64)
    nll = np.zeros((B, L))
    for b, n in itertools.product(range(B), range(int(shift), L)):
        nll[b, n] = -logp[b, n - shift, TOKENS[b, n]]
    return nll


def noised(times=(0.2, 0.5, 0.9), **kwargs):
    return corrupt(TOKENS, MASKABLE, jnp.array(times), example_keys(0, jnp.arange(B)), mask_token_id=MASK, **kwargs)


@pytest.mark.parametrize("chunk_size", [1, 5, 21, 64])
@pytest.mark.parametrize("shift", [True, False])
def test_token_nll_matches_the_definition_whatever_the_chunk(shift, chunk_size):
    nll = token_nll(HIDDEN, unembed, TOKENS, shift=shift, chunk_size=chunk_size)
    np.testing.assert_allclose(nll, naive_nll(shift), atol=1e-5)


@pytest.mark.parametrize("chunk_size", [1, 5, 64])
@pytest.mark.parametrize("shift", [True, False])
def test_token_nll_only_where_wanted(shift, chunk_size):
    wanted = jnp.zeros((B, L), bool).at[1, 3].set(True).at[2].set(True).at[0, 0].set(True)
    nll = token_nll(HIDDEN, unembed, TOKENS, wanted, shift=shift, chunk_size=chunk_size)
    np.testing.assert_allclose(nll, np.where(wanted, naive_nll(shift), 0), atol=1e-5)


def test_sums_match_the_definition():
    batch = noised()
    nll, loss_mask = naive_nll(True), np.asarray(batch.loss_mask)
    sums = loss_sums(HIDDEN, KERNEL, HeadPlan(1, chunk_size=4), batch)
    np.testing.assert_allclose(sums.nll, nll[loss_mask].sum(), rtol=1e-5)
    assert sums.loss == sums.weighted_nll
    np.testing.assert_allclose(sums.weighted_nll, (nll * loss_mask / np.array([[0.2], [0.5], [0.9]])).sum(), rtol=1e-5)
    assert sums.num_scored == loss_mask.sum() and sums.num_noisable == B * (L - 1)
    best = np.asarray(unembed(HIDDEN).argmax(-1))[:, :-1]
    assert sums.correct == ((best == TOKENS[:, 1:]) & loss_mask[:, 1:]).sum()


def test_corruption_masks_only_what_it_may_and_at_its_rate():
    length = 4000
    tokens, noisable_mask = jnp.ones((2, length), int), jnp.ones((2, length), bool).at[:, :1000].set(False)
    batch = corrupt(tokens, noisable_mask, jnp.array([0.3, 0.3]), example_keys(1, jnp.arange(2)), mask_token_id=9)
    masked = np.asarray(batch.tokens == 9)
    assert not masked[:, :1000].any() and abs(masked[:, 1000:].mean() - 0.3) < 0.02
    np.testing.assert_array_equal(masked, batch.loss_mask)
    assert (masked[0] != masked[1]).any()


def test_a_genuine_mask_token_is_not_scored():
    assert (TOKENS == MASK).any()
    batch = noised((1e-6,) * 3)
    assert (batch.tokens == MASK).any() and not batch.loss_mask.any()


def test_a_batch_without_masked_tokens_has_loss_zero_and_finite_gradients():
    batch = noised((1e-6,) * 3)

    def loss(hidden):
        sums = loss_sums(hidden, KERNEL, PLAN, batch)
        return sums.loss / sums.normalizer("masked_tokens")

    value, grad = jax.value_and_grad(loss)(HIDDEN)
    assert value == 0 and (grad == 0).all()


def test_position_zero_is_never_scored_under_the_shift():
    batch = NoisyBatch(TOKENS, TOKENS, jnp.ones((B, L), bool), MASKABLE, jnp.ones((B, L)))
    assert loss_sums(HIDDEN, KERNEL, PLAN, batch).num_scored == B * (L - 1)
    assert loss_sums(HIDDEN, KERNEL, PLAN, batch, shift=False).num_scored == B * L


def test_autoregression_is_the_same_loss_without_corruption():
    sums = loss_sums(HIDDEN, KERNEL, PLAN, clean_batch(TOKENS, MASKABLE))
    loss = sums.loss / sums.normalizer("all_tokens")
    np.testing.assert_allclose(loss, naive_nll(True)[:, 1:].mean(), rtol=1e-5)


def test_sums_add_over_micro_batches():
    batch = noised()
    part = lambda rows: loss_sums(HIDDEN[rows], KERNEL, PLAN, jax.tree.map(lambda x: x[rows], batch))  # noqa: E731
    total = LossSums.zero() + part(slice(0, 1)) + part(slice(1, 3))
    for a, b in zip(jax.tree.leaves(total), jax.tree.leaves(loss_sums(HIDDEN, KERNEL, PLAN, batch)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize("schedule", [NoiseSchedule("linear"), NoiseSchedule("cosine")], ids=lambda s: s.name)
def test_the_maskable_normaliser_is_unbiased_and_the_release_form_is_not(schedule):
    """Per-token losses are constants here, so the exact bound is their mean: each token is masked with probability
    m(t) and weighted m'(t)/m(t), whose integral over t is 1."""
    constants = jnp.asarray(np.random.default_rng(0).uniform(1, 8, L - 1), jnp.float32)
    exact = float(constants.mean())

    def estimates(seed):
        t = jax.random.uniform(jax.random.key(seed), (1,), minval=1e-3)
        keys = example_keys(seed, jnp.arange(1))
        batch = corrupt(TOKENS[:1], MASKABLE[:1], t, keys, mask_token_id=MASK, schedule=schedule)
        weighted = jnp.sum(jnp.where(batch.loss_mask[0, 1:], batch.weights[0, 1:] * constants, 0.0))
        return weighted / (L - 1), weighted / jnp.maximum(batch.loss_mask.sum(), 1)

    ours, release = jax.vmap(estimates)(jnp.arange(20000))
    error = float(ours.std() / np.sqrt(len(ours)))
    assert abs(float(ours.mean()) - exact) < 4 * error + 1e-3 * exact
    assert float(release.mean()) > 1.2 * exact
