"""Counter-based randomness: hashes, dropout, keys by purpose, and the host's generator."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import kstest

from dlm_jax.random import (
    annealing_seed,
    bernoulli,
    counter_hash,
    dropout,
    dropout_seeds,
    example_keys,
    purpose_key,
    uniform_by_index,
)


def test_hash_continues_from_a_state():
    np.testing.assert_array_equal(counter_hash(3, jnp.arange(9)), counter_hash(jnp.arange(9), state=counter_hash(3)))


def test_hash_bits_are_uniform_and_avalanche():
    bits = np.asarray(counter_hash(7, jnp.arange(20_000)))
    assert kstest(bits / 2**32, "uniform").pvalue > 0.01
    flipped = np.stack([bits ^ np.asarray(counter_hash(7, jnp.arange(20_000) ^ (1 << i))) for i in range(4)])
    shares = np.unpackbits(flipped.view(np.uint8)).mean()
    assert abs(shares - 0.5) < 0.005


def test_bernoulli_ends_are_exact():
    bits = jnp.asarray([0, 1, 2**31, 2**32 - 1], jnp.uint32)
    assert not bernoulli(bits, 0.0).any() and bernoulli(bits, 1.0).all()
    share = bernoulli(counter_hash(jnp.arange(100_000)), 0.3).mean()
    assert abs(share - 0.3) < 0.01


def test_dropout_is_inverted_and_off_without_seeds():
    x = jnp.ones((4, 50, 100))
    seeds = dropout_seeds(0, jnp.arange(4))
    y = np.asarray(dropout(x, 0.25, seeds, 1))
    assert set(np.unique(y)) == {0, np.float32(1 / 0.75)} and abs(y.mean() - 1) < 0.02
    np.testing.assert_array_equal(dropout(x, 0.25, None), x)
    np.testing.assert_array_equal(dropout(x, 0.0, seeds), x)
    assert (y != np.asarray(dropout(x, 0.25, seeds, 2))).any()  # another site


@pytest.mark.parametrize("rows", [slice(0, 2), slice(3, 4)])
def test_a_slice_has_the_randomness_of_the_full_array(rows):
    x, index = jnp.ones((4, 8, 6)), jnp.arange(4)
    full = dropout(x, 0.5, dropout_seeds(5, index), 1)
    np.testing.assert_array_equal(dropout(x[rows], 0.5, dropout_seeds(5, index[rows]), 1), full[rows])
    columns = dropout(x[:, :, 2:4], 0.5, dropout_seeds(5, index), 1, coordinates=[
        jnp.arange(8)[None, :, None], jnp.arange(2, 4)[None, None, :]])
    np.testing.assert_array_equal(columns, full[:, :, 2:4])
    np.testing.assert_array_equal(jax.random.key_data(example_keys(5, index))[rows],
                                  jax.random.key_data(example_keys(5, index[rows])))
    numbers = uniform_by_index(np.arange(4), 5, 0)
    np.testing.assert_array_equal(uniform_by_index(np.arange(4)[rows], 5, 0), numbers[rows])


def test_purposes_and_steps_differ():
    keys = [jax.random.key_data(purpose_key(seed, purpose)).tolist() for seed in (0, 1) for purpose in range(4)]
    assert len(set(map(tuple, keys))) == 8
    seeds = [int(seed(0, index)) for seed in (annealing_seed, dropout_seeds) for index in range(100)]
    assert len(set(seeds)) == 200


def test_host_generator_is_uniform_per_stream():
    index = np.arange(20_000)
    streams = [uniform_by_index(index, seed, stream) for seed in (0, 1) for stream in (0, 1)]
    for numbers in streams:
        assert kstest(numbers, "uniform").pvalue > 0.01
    assert abs(np.corrcoef(streams) - np.eye(4)).max() < 0.03
    assert uniform_by_index(np.array([0]), 0, 0)[0] == (0xE220A8397B1DCDAF >> 11) * 2.0**-53  # as published
