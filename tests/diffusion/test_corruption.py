"""The forward process, and the copies of block diffusion: what is masked, scored and weighted."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_jax.diffusion import (
    NoiseSchedule,
    block_times,
    clean_batch,
    complementary_mask,
    concat_noisy_and_clean,
    corrupt,
)
from dlm_jax.diffusion.corruption import corrupt_late_tokens, replace_tokens
from dlm_jax.random import example_keys

ROWS, LENGTH, MASK = 3, 12, 28
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, MASK + 1, (ROWS, LENGTH)), jnp.int32)  # some are MASK
NOISABLE = jnp.broadcast_to(jnp.arange(LENGTH) > 0, TOKENS.shape).at[1, :5].set(False)  # a prompt in the second
TIMES = jnp.array([0.3, 0.9, 0.6])


def noisy(times=TIMES, seed=0, **options):
    return corrupt(TOKENS, NOISABLE, times, example_keys(seed, jnp.arange(ROWS)), mask_token_id=MASK, **options)


def test_corruption_rate():
    length = 4000
    tokens, noisable = jnp.ones((2, length), int), jnp.ones((2, length), bool).at[:, :1000].set(False)
    batch = corrupt(tokens, noisable, jnp.array([0.3, 0.3]), example_keys(1, jnp.arange(2)), mask_token_id=9)
    masked = np.asarray(batch.tokens == 9)
    assert not masked[:, :1000].any() and abs(masked[:, 1000:].mean() - 0.3) < 0.02
    np.testing.assert_array_equal(masked, batch.loss_mask)
    assert (masked[0] != masked[1]).any()


def test_genuine_mask_token_is_not_scored():
    batch = noisy(jnp.full(ROWS, 1e-6))
    assert (batch.tokens == MASK).any() and not batch.loss_mask.any()


def test_clean_batch():
    batch = clean_batch(TOKENS, NOISABLE)
    assert (batch.tokens == batch.targets).all() and (batch.loss_mask == NOISABLE).all() and (batch.weights == 1).all()


def test_complementary_views_mask_each_token_once():
    first = noisy()
    views = [first, complementary_mask(first, MASK, (1 / (1 - TIMES))[:, None])]
    batch = concat_noisy_and_clean(views, 4)
    one, two, clean = jnp.split(batch.loss_mask, 3, axis=1)
    first_in_block = jnp.arange(LENGTH) % 4 == 0
    np.testing.assert_array_equal(one ^ two, NOISABLE & ~first_in_block)
    np.testing.assert_array_equal(clean, NOISABLE & first_in_block)
    np.testing.assert_array_equal(views[1].tokens, jnp.where(NOISABLE & ~first.loss_mask, MASK, TOKENS))
    weights = jnp.split(batch.weights, 3, axis=1)
    np.testing.assert_allclose(1 / weights[0] + 1 / weights[1], 2.0, rtol=1e-5)


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("schedule", [NoiseSchedule("linear"), NoiseSchedule("cosine")], ids=lambda s: s.name)
def test_bound_is_unbiased(schedule, blocks):
    """The expectation over times and masks of each noisable token's weight is 1, in blocks as without."""
    def weights(seed):
        times = jax.random.uniform(jax.random.key(seed), (ROWS,), minval=1e-3)
        if blocks:
            times = block_times(times, 4, LENGTH, low=1e-3, high=1.0)
        view = noisy(times, seed, schedule=schedule)
        batch = concat_noisy_and_clean([view], 4) if blocks else view
        return jnp.where(batch.loss_mask, batch.weights, 0).reshape(ROWS, -1, LENGTH).sum(axis=1)

    values = jax.jit(jax.vmap(weights))(jnp.arange(8_000))
    error = values.std(axis=0) / np.sqrt(len(values))
    assert (jnp.abs(values.mean(axis=0) - NOISABLE) < 5 * error + 2e-3).all()


def late(times, block_size=4, half_life=0.25, rows=ROWS, noisable=NOISABLE, seed=0):
    tokens = jnp.zeros((rows, LENGTH), jnp.int32)
    return corrupt_late_tokens(tokens, jnp.broadcast_to(noisable, tokens.shape), jnp.broadcast_to(times, tokens.shape),
                               example_keys(seed, jnp.arange(rows)), mask_token_id=MASK, block_size=block_size,
                               half_life=half_life)


@pytest.mark.parametrize("block_size", [4, 5, LENGTH])
def test_late_tokens_are_masked_in_exact_numbers(block_size):
    for share in (0.05, 0.3, 0.5, 0.8, 1.0):
        batch = late(share, block_size)
        for first in range(0, LENGTH, block_size):
            block = slice(first, first + block_size)
            expected = np.round(np.float32(share) * np.asarray(NOISABLE[:, block]).sum(axis=1))
            np.testing.assert_array_equal(batch.loss_mask[:, block].sum(axis=1), expected)
        assert not (batch.loss_mask & ~NOISABLE).any()
        np.testing.assert_array_equal(batch.loss_mask, batch.tokens == MASK)
        np.testing.assert_allclose(batch.weights, 1 / share, rtol=1e-6)


def test_late_tokens_are_masked_as_often_as_their_weights_say():
    """One of four masked, and three of four, against choices without replacement that are enumerated."""
    rows, half_life = 20_000, 0.25
    for share, number in ((0.25, 1), (0.75, 3)):
        found = np.mean(late(share, rows=rows, noisable=True, half_life=half_life).loss_mask.reshape(-1, 4), axis=0)
        weights, expected = 2 ** ((1 - share) * np.arange(4) / (half_life * 4)), np.zeros(4)
        for order in itertools.permutations(range(4), number):
            probability, left = 1.0, weights.sum()
            for one in order:
                probability, left = probability * weights[one] / left, left - weights[one]
            expected[list(order)] += probability
        np.testing.assert_allclose(found, expected, atol=0.01)


def test_all_masked_tokens_alike():
    np.testing.assert_allclose(np.mean(late(0.5, rows=20_000, noisable=True, half_life=1e6).loss_mask, axis=0), 0.5,
                               atol=0.02)


def test_replaced_tokens():
    noise = jnp.arange(LENGTH)
    batch = replace_tokens(TOKENS, NOISABLE, noise)
    np.testing.assert_array_equal(batch.tokens, jnp.where(NOISABLE, noise, TOKENS))
    np.testing.assert_array_equal(batch.loss_mask, NOISABLE)
    assert (batch.weights == 1).all() and (batch.targets == TOKENS).all()
