import itertools
import threading

import numpy as np
import pytest

from dlm_jax.data.loader import Loader, shuffled
from dlm_jax.data.rows import Rows
from dlm_jax.errors import DataError


def rows_of(count: int, length: int = 4) -> Rows:
    return Rows(np.arange(count, dtype=np.int32)[:, None] + np.zeros(length, np.int32))


def drawn(batch) -> list[int]:
    return batch.tokens[:, 0].tolist()


@pytest.mark.parametrize("count", [1, 2, 5, 64, 1000])
def test_every_epoch_is_a_permutation(count):
    epochs = [[shuffled(e * count + i, count, seed=7) for i in range(count)] for e in range(3)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    if count >= 64:
        assert epochs[0] != epochs[1] != epochs[2]
        assert epochs[1] != [shuffled(i, count, seed=8) for i in range(count)]  # seeds are no shifted epochs


def test_random_access_equals_iteration():
    iterated = Loader(rows_of(23), 5, seed=1)
    with iterated.prefetch(0) as batches:
        stream = [drawn(batch) for batch in itertools.islice(batches, 30)]
    for step in (29, 0, 17, 4):
        assert drawn(Loader(rows_of(23), 5, seed=1).batch(step)) == stream[step]
    flat = list(itertools.chain(*stream))
    assert sorted(flat[:23]) == sorted(flat[23:46]) == list(range(23))


def test_unshuffled_rows_come_in_order_and_wrap():
    loader = Loader(rows_of(3), 4, shuffle=False)
    assert drawn(loader.batch(0)) + drawn(loader.batch(1)) == [0, 1, 2, 0, 1, 2, 0, 1]


def test_parts_of_a_batch_make_the_batch():
    loader = Loader(rows_of(50), 8, seed=3)
    whole = loader.batch(1000)
    parts = [loader.batch(1000, rows=slice(i, i + 2)) for i in range(0, 8, 2)]
    for name in ("tokens", "maskable", "example_index"):
        np.testing.assert_array_equal(np.concatenate([getattr(part, name) for part in parts]), getattr(whole, name))


def test_what_a_batch_holds():
    batch = Loader(rows_of(9), 4, seed=0).batch(6)
    assert batch.tokens.dtype == np.int32
    assert batch.maskable.dtype == bool
    assert batch.example_index.dtype == np.uint32
    assert batch.example_index.tolist() == [24, 25, 26, 27]
    np.testing.assert_array_equal(batch.maskable, [[False, True, True, True]] * 4)
    assert batch.segment_ids is None
    assert batch.positions is None


def test_each_segment_starts_with_context():
    rows = Rows(np.zeros((1, 6), np.int32), np.asarray([[1, 1, 2, 2, 2, 3]], np.int32))
    batch = Loader(rows, 1).batch(0)
    assert batch.positions.tolist() == [[0, 1, 0, 1, 2, 0]]
    assert batch.maskable.tolist() == [[False, True, False, True, True, False]]


def test_no_rows_are_refused():
    with pytest.raises(DataError, match="no row"):
        Loader(rows_of(0), 4)


def test_prefetch_starts_where_asked_places_and_passes_exceptions_on():
    def place(batch):
        if batch.example_index[0] == 12:
            raise ValueError("device lost")
        return drawn(batch)

    loader = Loader(rows_of(9), 4)
    batches = loader.prefetch(1, place)
    assert [next(batches), next(batches)] == [drawn(loader.batch(1)), drawn(loader.batch(2))]
    with pytest.raises(ValueError, match="device lost"):
        next(batches)
    assert next(batches, None) is None
    assert not any(thread.name == "prefetch" for thread in threading.enumerate())


def test_closing_ends_the_thread_of_a_full_queue():
    batches = Loader(rows_of(9), 4).prefetch(depth=1)
    next(batches)
    batches.close()
    batches.close()
    assert next(batches, None) is None
    assert not any(thread.name == "prefetch" for thread in threading.enumerate())
