import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import kstest

from dlm_jax.diffusion import NoiseSchedule, anneal_ratio, block_times, sample_times
from dlm_jax.diffusion.schedule import radical_inverse
from dlm_jax.errors import ConfigError

SCHEDULES = [NoiseSchedule("linear"), NoiseSchedule("cosine"), NoiseSchedule("polynomial", power=3.0)]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.name)
def test_weight_is_the_log_derivative_of_mask_probability(schedule):
    t = jnp.linspace(0.05, 0.95, 19)
    derivative = jax.vmap(jax.grad(lambda t: jnp.log(schedule.mask_probability(t))))(t)
    np.testing.assert_allclose(schedule.weight(t), derivative, rtol=1e-5)
    np.testing.assert_allclose(schedule.mask_probability(jnp.array([0.0, 1.0])), [0.0, 1.0], atol=1e-7)


def test_radical_inverse():
    np.testing.assert_array_equal(radical_inverse(jnp.arange(8)), np.array([0, 4, 2, 6, 1, 5, 3, 7]) / 8)
    points = np.asarray(radical_inverse(jnp.arange(2**16)))
    np.testing.assert_array_equal(np.sort(points), np.arange(2**16) / 2**16)


@pytest.mark.parametrize("batch_size", [2, 64])
def test_times_balance_in_pairs(batch_size):
    index = jnp.arange(64, 64 + batch_size, dtype=jnp.uint32)
    t = np.asarray(sample_times(0, 1, index, batch_size, low=0.2, high=0.8)) - 0.2
    np.testing.assert_allclose(t[::2] + t[1::2], 0.6, atol=1e-6)
    for rows in (t[::2], t[1::2]):  # one in each stratum, and evenly spaced
        np.testing.assert_array_equal(np.sort(np.floor(rows / 0.6 * len(rows)).astype(int)), np.arange(len(rows)))
        np.testing.assert_allclose(np.diff(np.sort(rows)), 0.6 / len(rows), atol=1e-6)


def test_times_balance_across_devices():
    t = np.asarray(sample_times(0, 1, jnp.arange(64), 64, low=0.0)).reshape(16, 4)  # 16 devices of 4 rows
    np.testing.assert_allclose(t.mean(axis=1), 0.5, atol=1e-6)
    assert (np.floor(np.sort(t, axis=1)[:, 2:] * 2) == 1).all()  # half of its rows above a half


@pytest.mark.parametrize("batch_size", [1, 3, 5])
def test_times_of_odd_batches(batch_size):
    index = jnp.arange(7 * batch_size, 8 * batch_size, dtype=jnp.uint32)
    t = np.asarray(sample_times(0, 7, index, batch_size))
    pairs = batch_size // 2
    np.testing.assert_allclose(t[0 : 2 * pairs : 2] + t[1 : 2 * pairs : 2], 1 + 1e-3, atol=1e-6)
    assert ((t >= 1e-3) & (t <= 1)).all() and len(np.unique(t)) == batch_size


def test_times_of_a_slice():
    index = jnp.arange(32, 40, dtype=jnp.uint32)
    full = sample_times(3, 4, index, 8)
    np.testing.assert_array_equal(full[4:6], sample_times(3, 4, index[4:6], 8))
    assert (np.asarray(full) != np.asarray(sample_times(3, 5, index, 8))).all()


@pytest.mark.parametrize("row, batch_size", [(0, 1), (5, 8), (6, 8)])
def test_each_time_is_uniform(row, batch_size):
    sample = jax.jit(jax.vmap(lambda step: sample_times(0, step, jnp.array([row]), batch_size, low=0.0)))
    t = np.asarray(sample(jnp.arange(4000)))[:, 0]
    assert kstest(t, "uniform").pvalue > 0.01


def test_anneal_ratio():
    ratios = [float(anneal_ratio(step, 4)) for step in range(6)]
    np.testing.assert_allclose(ratios, [0.25, 0.5, 0.75, 1, 1, 1])
    assert float(anneal_ratio(0, 0)) == 1


@pytest.mark.parametrize("arguments, key", [(("sine",), "schedule.name"), (("polynomial", 0), "schedule.power")])
def test_invalid_schedules_are_refused(arguments, key):
    with pytest.raises(ConfigError, match=key):
        NoiseSchedule(*arguments)


def test_block_times_cover_the_range_and_are_uniform():
    low, high, size, length = 0.1, 0.9, 4, 64
    rows = low + (high - low) * (jnp.arange(4096) + 0.5) / 4096
    times = np.asarray(block_times(rows, size, length, low=low, high=high)).reshape(4096, 16, size)
    assert (times == times[:, :, :1]).all() and (times >= low).all() and (times <= high).all()
    np.testing.assert_array_equal(times[:, 0, 0], rows)
    for block in range(16):
        np.testing.assert_allclose(np.sort(times[:, block, 0]), rows, atol=2e-4)  # 1 / 4096 apart
    gaps = np.diff(np.sort(times[:, :, 0], axis=1), axis=1)
    assert gaps.max() < 2.7 * (high - low) / 16  # of random ones the largest is about four
