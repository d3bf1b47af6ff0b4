import numpy as np
import pytest

from dlm_jax.data.rows import Concatenated, Rows, gather


def rows_of(first: int, count: int, planes: tuple[str, ...] = ()) -> Rows:
    return Rows(np.arange(first, first + count)[:, None] + np.zeros(4, np.int32)).with_planes(planes)


def test_planes_that_are_added_say_one_document_all_maskable():
    rows = rows_of(0, 2).with_planes(("starts", "maskable"))
    assert rows.planes == ("starts", "maskable")
    assert rows.starts.tolist() == [[True, False, False, False]] * 2
    assert rows.maskable.all()
    kept = Rows(rows.tokens, maskable=np.zeros((2, 4), bool)).with_planes(("starts", "maskable"))
    assert not kept.maskable.any()


@pytest.mark.parametrize("planes", [(), ("starts",)])
def test_concatenated_sources_are_one(planes):
    parts = [rows_of(0, 3), rows_of(3, 5, planes), rows_of(8, 1)]
    joined = Concatenated(parts)
    assert (len(joined), joined.length, joined.planes) == (9, 4, planes)
    indices = np.asarray([8, 0, 4, 4, 3, 7, 2])
    drawn = joined[indices]
    assert drawn.tokens[:, 0].tolist() == indices.tolist()
    assert drawn.planes == planes
    assert joined[:5].tokens[:, 0].tolist() == [0, 1, 2, 3, 4]


def test_gathering_asks_each_source_once():
    asked = []

    class Source(Rows):
        def __getitem__(self, indices):
            asked.append(indices.tolist())
            return Rows(self.tokens[indices])

    sources = [Source(rows_of(0, 9).tokens), Source(rows_of(100, 9).tokens), Source(rows_of(200, 9).tokens)]
    rows = gather(sources, np.asarray([2, 0, 2, 0]), np.asarray([1, 2, 3, 4]), ())
    assert rows.tokens[:, 0].tolist() == [201, 2, 203, 4]
    assert sorted(asked) == [[1, 3], [2, 4]]
