"""The rules of masking: each against the law it must have, and the estimator against the enumerated bound."""

import itertools

import numpy as np
import pytest
from scipy.special import beta

from dlm_jax.evaluation.scoring import bound_masks, mask_all, reference_masks, time_masks


def values_of(length, seed=0):
    """What a pass that masks a set finds, any function of the set: [2**length] by the set's bits."""
    return np.random.default_rng(seed).gamma(2.0, size=2**length) * [bin(code).count("1") for code in range(2**length)]


def score(draw, values):
    return float(draw.weights @ values[draw.masked @ (1 << np.arange(draw.masked.shape[1]))])


def enumerated(values, length):
    """The integral over t of 1/t times the expectation over masks of rate t: Beta functions."""
    sizes = np.array([bin(code).count("1") for code in range(2**length)])
    return sum(beta(size, length - size + 1) * value for size, value in zip(sizes, values, strict=True) if size)


@pytest.mark.parametrize("length", [1, 2, 4])
def test_few_tokens_give_the_bound_exactly(length):
    values = values_of(length)
    assert score(bound_masks(length, 16, 0, 0), values) == pytest.approx(enumerated(values, length))


@pytest.mark.parametrize(("length", "num_samples"), [(5, 1), (5, 3), (7, 16), (4, 8)])
def test_more_tokens_give_it_without_bias(length, num_samples):
    values = values_of(length)
    found = [score(bound_masks(length, num_samples, 1, item), values) for item in range(4000)]
    assert abs(np.mean(found) - enumerated(values, length)) < 4 * np.std(found) / len(found) ** 0.5


@pytest.mark.parametrize(("length", "num_samples"), [(1, 4), (5, 3), (7, 16)])
def test_times_give_it_without_bias(length, num_samples):
    values = values_of(length)
    found = [score(time_masks(length, num_samples, 1, item), values) for item in range(6000)]
    assert abs(np.mean(found) - enumerated(values, length)) < 4 * np.std(found) / len(found) ** 0.5
    other = time_masks(length + 3, num_samples, 1, 7).masked
    assert all(any((row == longer[:length]).all() for longer in other) for row in time_masks(
        length, num_samples, 1, 7).masked)  # common random numbers


@pytest.mark.parametrize(("length", "num_samples"), [(20, 8), (25, 16), (40, 16), (127, 32)])
def test_tokens_count_about_equally(length, num_samples):
    for item in range(20):
        draw = bound_masks(length, num_samples, 0, item)
        counted = draw.weights @ draw.masked
        assert counted.mean() == pytest.approx(1)
        # A token that is masked alone counts length / num_samples at once; no other is far from 1.
        assert np.sort(np.abs(counted - 1))[:-2].max() < 0.5 and counted.std() < 0.4
        assert draw.masked.any(axis=1).all()
        assert len(np.unique(draw.masked, axis=0)) == len(draw.masked) <= num_samples


def test_masks_depend_on_seed_item_and_length_alone():
    first, again = bound_masks(20, 8, 3, 5), bound_masks(20, 8, 3, 5)
    np.testing.assert_array_equal(first.masked, again.masked)
    others = bound_masks(20, 8, 4, 5), bound_masks(20, 8, 3, 6)
    assert all(other.masked.shape != first.masked.shape or (other.masked != first.masked).any() for other in others)


def test_the_released_rule_step_by_step():
    uniform = np.random.default_rng(0).random((32, 3))
    total = 0.0
    values = values_of(3)
    for t, row in zip(range(32, 0, -1), uniform, strict=True):
        masked = [position for position in range(3) if row[position] < t / 32]
        if masked:  # a step that masks nothing counts as 0
            total += values[sum(1 << position for position in masked)] / len(masked)
    assert score(reference_masks(uniform), values) == pytest.approx(total / 32)
    assert len(reference_masks(uniform).masked) < 32


def test_a_causal_model_needs_one_pass():
    assert mask_all(3).masked.tolist() == [[True] * 3] and mask_all(3).weights.tolist() == [1]


def test_every_mask_is_a_uniform_subset():
    count = dict.fromkeys(itertools.combinations(range(5), 2), 0)
    for item in range(3000):
        draw = bound_masks(5, 10, 0, item)
        for row in draw.masked[draw.masked.sum(axis=1) == 2]:
            count[tuple(np.flatnonzero(row))] += 1
    observed = np.array(list(count.values()))
    assert observed.min() > 0.85 * observed.mean() and observed.max() < 1.15 * observed.mean()
