import itertools
import threading
import time

import numpy as np
import pytest

from dlm_jax.data.loader import Loader, random_lengths
from dlm_jax.data.rows import Rows
from dlm_jax.errors import DataError


def rows_of(count: int, length: int = 4) -> Rows:
    return Rows(np.arange(count, dtype=np.int32)[:, None] + np.zeros(length, np.int32))


def drawn(batch) -> list[int]:
    return batch.tokens[:, 0].tolist()


FIELDS = ("tokens", "noisable_mask", "example_index", "segment_ids", "positions")


def mixed(seed: int = 1) -> Loader:
    starts = np.zeros((23, 4), bool)
    starts[:, [0, 2]] = True
    return Loader([Rows(rows_of(23).tokens, starts), rows_of(50)], 5, weights=(0.3, 0.7), seed=seed, random_length=0.2)


@pytest.mark.parametrize("make", [lambda: Loader([rows_of(23)], 5, seed=1), mixed])
def test_batch_1000_drawn_directly_is_the_one_met_by_iterating(make):
    batches = make().batches()
    try:
        stream = list(itertools.islice(batches, 1001))
    finally:
        batches.close()
    for step in (1000, 0, 17, 4):
        batch = make().batch(step)
        for name in FIELDS:
            np.testing.assert_array_equal(getattr(batch, name), getattr(stream[step], name))


def test_epochs_run_on_across_batches():
    loader = Loader([rows_of(23)], 5, seed=1)
    flat = [row for step in range(30) for row in drawn(loader.batch(step))]
    assert sorted(flat[:23]) == sorted(flat[23:46]) == list(range(23))


def test_unshuffled_rows_come_in_order_and_wrap():
    loader = Loader([rows_of(3)], 4, shuffle=False)
    assert drawn(loader.batch(0)) + drawn(loader.batch(1)) == [0, 1, 2, 0, 1, 2, 0, 1]


def test_parts_of_a_batch_make_the_batch():
    loader = Loader([rows_of(50), rows_of(9)], 8, weights=(2, 1), seed=3, random_length=0.3)
    whole = loader.batch(1000)
    parts = [loader.batch(1000, rows=slice(i, i + 2)) for i in range(0, 8, 2)]
    for name in FIELDS:
        np.testing.assert_array_equal(np.concatenate([getattr(part, name) for part in parts]), getattr(whole, name))


def test_what_a_batch_holds():
    batch = Loader([rows_of(9)], 4, seed=0).batch(6)
    assert batch.tokens.dtype == np.int32
    assert batch.noisable_mask.dtype == bool
    assert batch.example_index.dtype == np.uint32
    assert batch.example_index.tolist() == [24, 25, 26, 27]
    np.testing.assert_array_equal(batch.noisable_mask, [[False, True, True, True]] * 4)
    assert batch.segment_ids is None
    assert batch.positions is None


def test_each_segment_starts_with_context():
    rows = Rows(np.zeros((1, 6), np.int32), np.asarray([[1, 0, 1, 0, 0, 1]], bool))
    batch = Loader([rows], 1).batch(0)
    assert batch.segment_ids.tolist() == [[1, 1, 2, 2, 2, 3]]
    assert batch.positions.tolist() == [[0, 1, 0, 1, 2, 0]]
    assert batch.noisable_mask.tolist() == [[False, True, False, True, True, False]]


def test_a_prompt_is_never_maskable():
    noisable_mask = np.asarray([[1, 0, 0, 1, 1, 0]], bool)
    batch = Loader([Rows(np.zeros((1, 6), np.int32), noisable_mask=noisable_mask)], 1).batch(0)
    assert batch.noisable_mask.tolist() == [[False, False, False, True, True, False]]


def test_rows_cut_to_a_random_length():
    loader, whole = Loader([rows_of(40, 16)], 32, random_length=0.25), Loader([rows_of(40, 16)], 32)
    counts = []
    for step in range(40):
        batch = loader.batch(step)
        np.testing.assert_array_equal(batch.tokens, whole.batch(step).tokens)
        seen = batch.segment_ids == 1
        counts += seen.sum(axis=1).tolist()
        # What is kept is one segment from the left; the rest is out of its sight and never scored.
        np.testing.assert_array_equal(seen, np.arange(16) < seen.sum(axis=1, keepdims=True))
        np.testing.assert_array_equal(batch.noisable_mask, seen & (np.arange(16) > 0))
    cut = [count for count in counts if count < 16]
    assert min(counts) >= 2
    assert 0.18 < len(cut) / len(counts) < 0.3
    assert set(range(2, 16)) <= set(cut)


def test_random_lengths_are_uniform_and_depend_on_the_example_alone():
    examples = np.arange(200_000)
    lengths = random_lengths(examples, 1.0, 11, seed=4)
    assert set(lengths.tolist()) == set(range(2, 12))
    np.testing.assert_allclose(np.bincount(lengths)[2:] / len(lengths), 0.1, atol=0.005)
    np.testing.assert_array_equal(lengths[5000:5100], random_lengths(examples[5000:5100], 1.0, 11, seed=4))
    assert (lengths != random_lengths(examples, 1.0, 11, seed=5)).any()


def test_no_rows_are_refused():
    for sources in ([], [rows_of(0)], [rows_of(3), rows_of(0)]):
        with pytest.raises(DataError, match="no row"):
            Loader(sources, 4, weights=[1.0] * len(sources))


def test_iteration_starts_where_asked_places_and_passes_exceptions_on():
    loader = Loader([rows_of(9)], 4)

    def place(read):
        parts = [read(slice(0, 2)), read(slice(2, 4))]
        if parts[0].example_index[0] == 12:
            raise ValueError("device lost")
        return drawn(parts[0]) + drawn(parts[1])

    batches = loader.batches(1, place)
    assert [next(batches), next(batches)] == [drawn(loader.batch(1)), drawn(loader.batch(2))]
    with pytest.raises(ValueError, match="device lost"):
        next(batches)
    batches.close()


def test_closing_ends_the_threads():
    def threads_left(wanted: int) -> int:
        """Threads that read ahead; they end soon after the iterator is closed."""
        deadline = time.monotonic() + 10
        while (left := sum("prefetch" in thread.name for thread in threading.enumerate())) > wanted \
                and time.monotonic() < deadline:
            time.sleep(0.01)
        return left

    before = threads_left(0)
    batches = Loader([rows_of(9)], 4).batches()
    next(batches)
    assert threads_left(99) > before
    batches.close()
    batches.close()
    assert threads_left(before) == before
