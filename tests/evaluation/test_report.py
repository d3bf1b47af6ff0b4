"""Statistics of results."""

import numpy as np
import pytest

from dlm_jax.errors import DataError
from dlm_jax.evaluation.report import mean_of, paired_difference, ratio_of


def test_mean_of():
    found = mean_of([1, 0, 0, 1, 1])
    assert found.mean == 0.6 and found.count == 5
    assert found.standard_error == pytest.approx((0.6 * 0.4 / 4) ** 0.5)
    assert mean_of([1.0]).standard_error is None
    with pytest.raises(DataError):
        mean_of([])


def test_ratio_of_against_repetition():
    rng = np.random.default_rng(0)
    sizes = rng.integers(5, 50, (2000, 200))
    nats = sizes * rng.gamma(9.0, 1 / 3, sizes.shape)
    found = [ratio_of(*row) for row in zip(nats, sizes, strict=True)]
    assert found[0].mean == pytest.approx(nats[0].sum() / sizes[0].sum())
    assert np.mean([f.standard_error for f in found]) == pytest.approx(np.std([f.mean for f in found]), rel=0.1)


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
