"""Means over items with their errors, and paired differences of two models on the same items."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dlm_jax.errors import DataError

_RESAMPLES = 10_000  # of a mean; other aggregates are computed one resample at a time
_FEW = 1_000


@dataclasses.dataclass(frozen=True)
class Mean:
    """A mean, or another aggregate, over `count` items.

    Attributes:
      standard_error: treats the items as a random sample; None: unknown, as for a single item.
      monte_carlo_error: from the random masks of a bound, about twice the true one (`monte_carlo_error`); None: exact,
        or unknown.
    """

    mean: float
    standard_error: float | None
    count: int
    monte_carlo_error: float | None = None


@dataclasses.dataclass(frozen=True)
class Difference:
    """The difference of two models' aggregates on the same items.

    Attributes:
      standard_error: over items, in which their difficulty cancels.
      low, high: 95 % interval by bootstrap over items.
    """

    mean: float
    standard_error: float | None
    low: float
    high: float
    count: int


def mean_of(values: Sequence[float] | np.ndarray) -> Mean:
    """Returns the mean of `values` [items] and its standard error, s / sqrt(n)."""
    values = np.asarray(values, np.float64)
    if not len(values):
        raise DataError("there are no items to take a mean of")
    error = float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else None
    return Mean(float(values.mean()), error, len(values))


def aggregate_of(values: Sequence[Any], aggregate: Callable[[Sequence[Any]], float], seed: int = 0) -> Mean:
    """Returns an aggregate of values of items, with its error by bootstrap; texts have no error."""
    if _is_mean(aggregate):
        return mean_of(values)
    found = float(aggregate(list(values)))
    if len(values) < 2 or isinstance(values[0], str):
        return Mean(found, None, len(values))
    rng = np.random.default_rng(seed)
    resampled = [aggregate([values[i] for i in rng.integers(0, len(values), len(values))]) for _ in range(_FEW)]
    return Mean(found, float(np.std(resampled, ddof=1)), len(values))


def paired_difference(values: Sequence[Any], others: Sequence[Any],
                      aggregate: Callable[[Sequence[Any]], float] = np.mean, seed: int = 0) -> Difference:
    """Returns aggregate(values) - aggregate(others), [items] each, with a percentile bootstrap over the items."""
    if len(values) != len(others):
        raise DataError(f"{len(values)} and {len(others)} items cannot be compared in pairs")
    rng, count = np.random.default_rng(seed), len(values)
    if _is_mean(aggregate):
        differences = np.asarray(values, np.float64) - np.asarray(others, np.float64)
        found = mean_of(differences)
        # In chunks, so that large tasks need little memory.
        means = np.concatenate([differences[rng.integers(0, count, (_RESAMPLES // 100, count))].mean(axis=1)
                                for _ in range(100)])
        center, error = found.mean, found.standard_error
    else:
        means = np.array([aggregate([values[i] for i in drawn]) - aggregate([others[i] for i in drawn])
                          for drawn in rng.integers(0, count, (_FEW, count))])
        center = float(aggregate(list(values)) - aggregate(list(others)))
        error = float(means.std(ddof=1)) if count > 1 else None
    low, high = np.quantile(means, (0.025, 0.975))
    return Difference(center, error, float(low), float(high), count)


def monte_carlo_error(first: Sequence[Any], second: Sequence[Any], aggregate: Callable[[Sequence[Any]], float],
                      seed: int = 0) -> float:
    """Returns the error of an aggregate that the random masks cause, from the values by each half of the passes.

    It is the standard deviation over choices of a half for each item; for a mean sqrt(mean((a - b)^2) / n) / 2. The
    halves share their tokens out between them, so each misses more than both together: this is about twice the error.
    """
    if _is_mean(aggregate):
        differences = np.asarray(first, np.float64) - np.asarray(second, np.float64)
        return float(np.sqrt((differences**2).mean() / len(first)) / 2)
    rng = np.random.default_rng(seed)
    chosen = [aggregate([(a, b)[i] for a, b, i in zip(first, second, row, strict=True)])
              for row in rng.integers(0, 2, (200, len(first)))]
    return float(np.std(chosen, ddof=1))


def is_comparable(values: Sequence[Any]) -> bool:
    """Returns whether the values of items are numbers, or pairs of them."""
    return all(isinstance(value, (int, float, np.number)) or
               (isinstance(value, tuple) and all(isinstance(x, (int, float, np.number)) for x in value))
               for value in values)


def _is_mean(aggregate: Callable) -> bool:
    return getattr(aggregate, "__name__", "") == "mean"
