"""Means with their standard errors, and the difference of two models on the same items."""

import dataclasses

import numpy as np

from dlm_jax.errors import DataError

_RESAMPLES = 10_000


@dataclasses.dataclass(frozen=True)
class Mean:
    """A mean over `count` items; `standard_error` is of the items as a sample of all there might be, None for one."""

    mean: float
    standard_error: float | None
    count: int


@dataclasses.dataclass(frozen=True)
class Difference:
    """The mean difference of two models on the same items.

    Attributes:
      standard_error: of the differences, item by item, so that what is hard for both models cancels.
      low, high: a 95 % interval by bootstrap over items.
    """

    mean: float
    standard_error: float | None
    low: float
    high: float
    count: int


def mean_of(values: np.ndarray) -> Mean:
    """The mean of `values` [items] and its standard error, s / sqrt(n)."""
    values = np.asarray(values, np.float64)
    if not len(values):
        raise DataError("there are no items to take a mean of")
    error = float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else None
    return Mean(float(values.mean()), error, len(values))


def ratio_of(numerator: np.ndarray, denominator: np.ndarray) -> Mean:
    """The ratio of two sums over items, [items] each, with its error by linearisation (nats per token of texts)."""
    numerator, denominator = np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)
    ratio = numerator.sum() / denominator.sum()
    return dataclasses.replace(mean_of((numerator - ratio * denominator) / denominator.mean()), mean=float(ratio))


def paired_difference(values: np.ndarray, others: np.ndarray, seed: int = 0) -> Difference:
    """Of `values` minus `others`, [items] each, item by item; the percentile bootstrap draws whole pairs."""
    values, others = np.asarray(values, np.float64), np.asarray(others, np.float64)
    if values.shape != others.shape:
        raise DataError(f"{len(values)} and {len(others)} items cannot be compared in pairs")
    found = mean_of(values - others)
    rng = np.random.default_rng(seed)
    # In parts, so that large tasks need little memory.
    means = [((values - others)[rng.integers(0, len(values), (_RESAMPLES // 100, len(values)))]).mean(axis=1)
             for _ in range(100)]
    low, high = np.quantile(np.concatenate(means), (0.025, 0.975))
    return Difference(found.mean, found.standard_error, float(low), float(high), found.count)
