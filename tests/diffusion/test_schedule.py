import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_jax.diffusion import NoiseSchedule, anneal_ratio, sample_times
from dlm_jax.errors import ConfigError

SCHEDULES = [NoiseSchedule("linear"), NoiseSchedule("cosine"), NoiseSchedule("polynomial", power=3.0)]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.name)
def test_the_weight_is_the_logarithmic_derivative_of_the_mask_probability(schedule):
    t = jnp.linspace(0.05, 0.95, 19)
    derivative = jax.vmap(jax.grad(lambda t: jnp.log(schedule.mask_probability(t))))(t)
    np.testing.assert_allclose(schedule.weight(t), derivative, rtol=1e-5)
    np.testing.assert_allclose(schedule.mask_probability(jnp.array([0.0, 1.0])), [0.0, 1.0], atol=1e-7)


def test_times_cover_the_range_one_in_each_stratum():
    index = jnp.arange(64, 128, dtype=jnp.uint32)
    t = np.asarray(sample_times(0, 1, index, 64, low=0.2, high=0.8))
    np.testing.assert_array_equal(np.floor((t - 0.2) / 0.6 * 64 + 1e-4).astype(int), np.arange(64))


def test_times_belong_to_the_example_not_to_the_device():
    index = jnp.arange(32, 40, dtype=jnp.uint32)
    whole = sample_times(3, 4, index, 8)
    np.testing.assert_array_equal(whole[4:6], sample_times(3, 4, index[4:6], 8))
    assert (np.asarray(whole) != np.asarray(sample_times(3, 5, index, 8))).all()


def test_a_time_alone_is_uniform():
    t = np.asarray(jax.vmap(lambda step: sample_times(0, step, jnp.array([5]), 8))(jnp.arange(4000)))[:, 0]
    within = (t - 5 / 8) * 8  # the offset inside stratum 5, up to the shift of min_time
    assert abs(within.mean() - 0.5) < 0.02 and abs(within.var() - 1 / 12) < 0.01


def test_annealing_rises_from_the_first_step_and_stays_open():
    ratios = [float(anneal_ratio(step, 4)) for step in range(6)]
    np.testing.assert_allclose(ratios, [0.25, 0.5, 0.75, 1, 1, 1])
    assert float(anneal_ratio(0, 0)) == 1


def test_unknown_schedules_are_refused():
    with pytest.raises(ConfigError, match="unknown noise schedule 'sine'"):
        NoiseSchedule("sine")
    with pytest.raises(ConfigError, match="must be positive"):
        NoiseSchedule("polynomial", power=0)
