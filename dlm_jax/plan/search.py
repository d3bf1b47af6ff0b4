"""The largest of something that fits, found with as few trials as can be."""

from collections.abc import Callable
from typing import NamedTuple


class Found(NamedTuple):
    """What a search saw: `largest` fits (0: nothing does), `refused`, the smallest that does not, if one was met."""

    largest: int
    refused: int | None
    trials: int


def largest_that_fits(needs: Callable[[int], tuple[bool, float]], limit: float, start: int = 1,
                      most_trials: int = 10) -> Found:
    """Searches upwards from `start`, or downwards where that does not fit, by the line through what fitted.

    Args:
      needs: says of a number whether it fits, and what it needs; what does not fit may need anything.
      limit: what there is.
    """
    fitted: dict[int, float] = {0: 0.0}
    refused: int | None = None
    guess, trials = start, 0
    while trials < most_trials and guess != refused and guess not in fitted:
        fits, need = needs(guess)
        trials += 1
        if fits:
            fitted[guess] = need
        else:
            refused = guess if refused is None else min(guess, refused)
        guess = _next(fitted, refused, limit)
    return Found(max(fitted), refused, trials)


def _next(fitted: dict[int, float], refused: int | None, limit: float) -> int:
    """The next number to try: where the line through the two largest that fitted meets the limit."""
    largest = max(fitted)
    if len(fitted) == 1:  # only the 0 from which one starts
        return (refused or 2) // 2
    if len(fitted) == 2:
        guess = 2 * largest
    else:
        second = max(number for number in fitted if number < largest)
        slope = max((fitted[largest] - fitted[second]) / (largest - second), 1e-9)
        guess = int(min(max(largest + (limit - fitted[largest]) / slope, largest + 1), 8 * largest))
    if refused is not None and guess >= refused:
        guess = (largest + refused) // 2
    return guess
