"""Means, paired differences and Monte Carlo errors against repetition."""

import math

import numpy as np
import pytest

from dlm_jax.errors import DataError
from dlm_jax.evaluation.compare import aggregate_of, is_comparable, mean_of, monte_carlo_error, paired_difference


def mean(values):
    return sum(values) / len(values)


def ratio(values):
    """Bits per byte and the like."""
    return sum(a for a, _ in values) / sum(b for _, b in values)


def test_mean_of():
    found = mean_of([1, 0, 0, 1, 1])
    assert found.mean == 0.6 and found.count == 5
    assert found.standard_error == pytest.approx((0.6 * 0.4 / 4) ** 0.5)
    assert mean_of([1.0]).standard_error is None
    with pytest.raises(DataError):
        mean_of([])


def test_aggregates_against_repetition():
    rng = np.random.default_rng(0)
    sizes = rng.integers(5, 50, (400, 150))
    nats = sizes * rng.gamma(9.0, 1 / 3, sizes.shape)
    rows = [list(zip(*row, strict=True)) for row in zip(nats.tolist(), sizes.tolist(), strict=True)]
    found = [aggregate_of(row, ratio) for row in rows[:10]]
    assert found[0].mean == pytest.approx(nats[0].sum() / sizes[0].sum())
    assert np.mean([f.standard_error for f in found]) == pytest.approx(np.std([ratio(row) for row in rows]), rel=0.2)
    assert aggregate_of([0.0, 1.0], mean) == mean_of([0.0, 1.0])
    assert aggregate_of(["a b", "a"], lambda texts: 0.5).standard_error is None


def test_paired_difference_covers_and_is_narrower():
    rng = np.random.default_rng(1)
    hard = rng.random((200, 300))  # items are hard for both models alike
    first, second = (rng.random(hard.shape) / 4 + hard < 0.8 for _ in range(2))
    found = [paired_difference(a, b) for a, b in zip(first[:20], second[:20], strict=True)]
    assert np.mean([f.low <= 0 <= f.high for f in found]) >= 0.8
    apart = (mean_of(first[0]).standard_error ** 2 + mean_of(second[0]).standard_error ** 2) ** 0.5
    assert found[0].standard_error < 0.8 * apart
    assert found[0].high - found[0].low == pytest.approx(2 * 1.96 * found[0].standard_error, rel=0.15)
    with pytest.raises(DataError, match="3 and 2"):
        paired_difference([1, 2, 3], [1, 2])


def test_paired_difference_of_other_aggregates():
    rng = np.random.default_rng(2)
    first = [(x, 1.0) for x in rng.random(50).tolist()]
    second = [(x + 0.5, 1.0) for x, _ in first]
    found = paired_difference(first, second, ratio)
    assert found.mean == pytest.approx(-0.5) and found.low == pytest.approx(-0.5) == found.high
    plain = paired_difference([x for x, _ in first], rng.random(50), mean)
    assert plain.low < plain.mean < plain.high


def test_monte_carlo_error_of_independent_halves():
    rng = np.random.default_rng(3)
    truth = rng.random(200)
    halves = truth + rng.normal(0, 0.3, (400, 2, 200))
    actual = halves.mean(axis=1).mean(axis=1).std()
    estimated = [monte_carlo_error(a, b, mean) for a, b in halves[:50]]
    assert np.mean(estimated) == pytest.approx(actual, rel=0.1)
    first, second = halves[0]
    pairs = [[(x, 1.0) for x in half.tolist()] for half in (first, second)]
    assert monte_carlo_error(*pairs, ratio) == pytest.approx(estimated[0], rel=0.2)
    assert monte_carlo_error(truth, truth, mean) == 0


def test_is_comparable():
    assert is_comparable([1, 0.5, np.float32(1)]) and is_comparable([(1.0, 2), (-math.inf, 3)])
    assert not is_comparable(["a"]) and not is_comparable([("a", 1)]) and not is_comparable([None])
