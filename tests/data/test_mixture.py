import itertools

import numpy as np
import pytest

from dlm_jax.data.loader import Mixture, period_counts, interleaving, shuffled_index
from dlm_jax.data.rows import Rows
from dlm_jax.errors import DataError


def rows_of(first: int, count: int) -> Rows:
    return Rows(np.arange(first, first + count)[:, None] + np.zeros(2, np.int32))


def drawn(mixture: Mixture, examples) -> list[int]:
    return mixture[np.asarray(examples)].tokens[:, 0].tolist()


@pytest.mark.parametrize("count", [1, 2, 5, 64, 1000])
def test_every_epoch_is_a_permutation(count):
    epochs = [[shuffled_index(e * count + i, count, seed=7) for i in range(count)] for e in range(3)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    if count >= 64:
        assert epochs[0] != epochs[1] != epochs[2]
        assert epochs[1] != [shuffled_index(i, count, seed=8) for i in range(count)]  # seeds are no shifted epochs
        assert epochs[0] != [shuffled_index(i, count, seed=7, source=1) for i in range(count)]


RANDOM = np.random.default_rng(3)
WEIGHTS = [(0.69, 0.31), (0.693584, 0.306416), (1.0, 2.0), (0.5, 0.3, 0.2), (1.0,) * 7, (0.999, 0.001), (5.0,),
           (1 / 3, 2 / 3), *(tuple(RANDOM.dirichlet([1.0] * k).tolist()) for k in (2, 3, 4, 6))]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_every_prefix_holds_each_source_to_within_one_row_of_its_share(weights):
    mixture = Mixture([rows_of(0, 10)] * len(weights), weights)
    shares = np.asarray(weights) / sum(weights)
    for start in (0, 777_777):  # anywhere in the sequence, as `nth` counts from its beginning
        count = 250_000
        which, nth = mixture.locate(np.arange(start, start + count))
        for source, share in enumerate(shares):
            here = which == source
            np.testing.assert_array_equal(nth[here], nth[here][0] + np.arange(here.sum()))
            given = nth[here][0] + np.cumsum(here)
            assert np.abs(given - share * (start + np.arange(1, count + 1))).max() < 1


def test_periods_are_the_smallest_exact_ones():
    assert period_counts((0.69, 0.31)).tolist() == [69, 31]
    assert period_counts((2.0, 4.0, 6.0)).tolist() == [1, 2, 3]
    assert period_counts((0.693584, 0.306416)).tolist() == [43349, 19151]
    assert period_counts((7.0,)).tolist() == [1]


def test_tijdeman_keeps_his_bound():
    for k in (2, 3, 5):
        which, _, counts = interleaving(tuple(float(x) for x in RANDOM.integers(1, 60, k)))
        share = np.cumsum(which[:, None] == np.arange(k), axis=0) - np.arange(1, len(which) + 1)[:, None] * (
            counts / counts.sum())
        assert np.abs(share).max() <= 1 - 1 / (2 * k - 2) + 1e-9


def test_each_source_runs_through_its_own_rows():
    mixture = Mixture([rows_of(0, 6), rows_of(100, 4)], (0.75, 0.25), seed=5)
    stream = drawn(mixture, range(16))
    first, second = [x for x in stream if x < 100], [x for x in stream if x >= 100]
    assert sorted(first[:6]) == sorted(first[6:]) == list(range(6))
    assert sorted(second) == [100, 101, 102, 103]
    assert drawn(mixture, [11, 3, 3]) == [stream[11], stream[3], stream[3]]


def test_one_source_is_the_same_with_and_without_a_weight():
    plain, weighted = Mixture([rows_of(0, 9)], seed=2), Mixture([rows_of(0, 9)], (0.4,), seed=2)
    assert drawn(plain, range(20)) == drawn(weighted, range(20))


def test_seeds_differ_and_no_shuffle_keeps_the_order():
    streams = [drawn(Mixture([rows_of(0, 50)], seed=seed), range(50)) for seed in range(3)]
    assert all(a != b for a, b in itertools.combinations(streams, 2))
    assert drawn(Mixture([rows_of(0, 3)], shuffle=False), range(7)) == [0, 1, 2, 0, 1, 2, 0]


def test_weights_must_match_and_not_be_absurd():
    with pytest.raises(DataError, match="2 sources to mix need as many weights, not 0"):
        Mixture([rows_of(0, 3)] * 2)
    with pytest.raises(DataError, match="more than 1,048,576 to 1"):
        Mixture([rows_of(0, 3)] * 2, (1.0, 1e-7))
