"""The loss from hidden states against its definition from all logits."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_jax.diffusion import HeadPlan, LossSums, NoisyBatch, clean_batch, corrupt, loss_sums, token_nll
from dlm_jax.random import example_keys

B, L, D, V, MASK = 3, 21, 8, 17, 16
KEYS = jax.random.split(jax.random.key(0), 3)
HIDDEN = jax.random.normal(KEYS[0], (B, L, D))
KERNEL = jax.random.normal(KEYS[1], (D, V))
TOKENS = jax.random.randint(KEYS[2], (B, L), 0, V)
PLAN = HeadPlan(1)
NOISABLE = jnp.ones((B, L), bool).at[:, 0].set(False)


def unembed(hidden):
    return hidden @ KERNEL


def naive_nll(shift):
    logp = np.asarray(jax.nn.log_softmax(unembed(HIDDEN)), np.float64)
    nll = np.zeros((B, L))
    for b, n in itertools.product(range(B), range(int(shift), L)):
        nll[b, n] = -logp[b, n - shift, TOKENS[b, n]]
    return nll


def noisy(times=(0.2, 0.5, 0.9), **kwargs):
    return corrupt(TOKENS, NOISABLE, jnp.array(times), example_keys(0, jnp.arange(B)), mask_token_id=MASK, **kwargs)


scores = jax.jit(token_nll, static_argnames=("unembed", "shift", "chunk_size"))
sums_of = jax.jit(loss_sums, static_argnames=("plan", "shift"))


@pytest.mark.parametrize("chunk_size", [1, 5, 64])
@pytest.mark.parametrize("shift", [True, False])
def test_token_nll(shift, chunk_size):
    some = jnp.zeros((B, L), bool).at[1, 3].set(True).at[2].set(True).at[0, 0].set(True)
    for mask in (jnp.ones((B, L), bool), some):
        nll = scores(HIDDEN, unembed, TOKENS, mask, shift=shift, chunk_size=chunk_size)
        np.testing.assert_allclose(nll, np.where(mask, naive_nll(shift), 0), atol=1e-5)


def test_token_nll_is_everywhere_without_a_mask():
    np.testing.assert_allclose(scores(HIDDEN, unembed, TOKENS), naive_nll(True), atol=1e-5)


def test_loss_sums():
    batch = noisy()
    nll, loss_mask = naive_nll(True), np.asarray(batch.loss_mask)
    sums = sums_of(HIDDEN, KERNEL, HeadPlan(1, chunk_size=4), batch)
    np.testing.assert_allclose(sums.nll, nll[loss_mask].sum(), rtol=1e-5)
    assert sums.loss == sums.weighted_nll
    np.testing.assert_allclose(sums.weighted_nll, (nll * loss_mask / np.array([[0.2], [0.5], [0.9]])).sum(), rtol=1e-5)
    assert sums.num_scored == loss_mask.sum() and sums.num_noisable == B * (L - 1)
    best = np.asarray(unembed(HIDDEN).argmax(-1))[:, :-1]
    assert sums.correct == ((best == TOKENS[:, 1:]) & loss_mask[:, 1:]).sum()


def test_batch_without_masked_tokens():
    batch = noisy((1e-6,) * 3)

    def loss(hidden):
        sums = loss_sums(hidden, KERNEL, PLAN, batch)
        return sums.loss / sums.normalizer("masked_tokens")

    value, grad = jax.jit(jax.value_and_grad(loss))(HIDDEN)
    assert value == 0 and (grad == 0).all()


def test_position_zero_is_not_scored_under_the_shift():
    batch = NoisyBatch(TOKENS, TOKENS, jnp.ones((B, L), bool), NOISABLE, jnp.ones((B, L)))
    assert sums_of(HIDDEN, KERNEL, PLAN, batch).num_scored == B * (L - 1)
    assert sums_of(HIDDEN, KERNEL, PLAN, batch, shift=False).num_scored == B * L


def test_autoregressive_loss():
    sums = sums_of(HIDDEN, KERNEL, PLAN, clean_batch(TOKENS, NOISABLE))
    loss = sums.loss / sums.normalizer("all_tokens")
    np.testing.assert_allclose(loss, naive_nll(True)[:, 1:].mean(), rtol=1e-5)


def test_sums_add_over_micro_batches():
    batch = noisy()
    sums = lambda rows: sums_of(HIDDEN[rows], KERNEL, PLAN, jax.tree.map(lambda x: x[rows], batch))  # noqa: E731
    total = LossSums.zero() + sums(slice(0, 1)) + sums(slice(1, 3))
    for a, b in zip(jax.tree.leaves(total), jax.tree.leaves(sums_of(HIDDEN, KERNEL, PLAN, batch)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
