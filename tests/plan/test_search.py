import math

import pytest

from dlm_jax.plan.search import Found, largest_that_fits

LIMIT = 15.75


@pytest.mark.parametrize("start", [1, 3, 100])
@pytest.mark.parametrize("slope", [0.01, 0.3, 5.0])
@pytest.mark.parametrize("offset", [0.1, 7.0, 15.2, 16.0])
def test_it_is_the_largest(offset, slope, start):
    tried = []

    def needs(rows: int) -> tuple[bool, float]:
        tried.append(rows)
        return offset + slope * rows <= LIMIT, offset + slope * rows

    found = largest_that_fits(needs, LIMIT, start, most_trials=30)
    assert found == Found(max(math.floor((LIMIT - offset) / slope + 1e-9), 0), found.largest + 1, len(tried))
    assert len(tried) == len(set(tried)) <= 12  # each trial is a compilation


def test_a_straight_line_needs_four_trials_and_no_more_than_allowed_are_made():
    needs = lambda rows: (3 + 0.5 * rows <= LIMIT, 3 + 0.5 * rows)  # noqa: E731
    assert largest_that_fits(needs, LIMIT, 2) == Found(25, 26, 4)
    assert largest_that_fits(needs, LIMIT, 2, most_trials=2) == Found(4, None, 2)


def test_what_the_line_promises_is_believed_only_when_it_fits():
    """Need that jumps: only what was accepted is reported."""
    needs = lambda rows: (rows <= 11, 0.1 * rows)  # noqa: E731
    found = largest_that_fits(needs, LIMIT, 1)
    assert found.largest == 11 and found.refused == 12
