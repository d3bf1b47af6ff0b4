import numpy as np
import pytest

from dlm_jax.data.rows import ConcatenatedRows, Rows, gather_rows


def rows_of(first: int, count: int, row_masks: tuple[str, ...] = ()) -> Rows:
    return Rows(np.arange(first, first + count)[:, None] + np.zeros(4, np.int32)).with_row_masks(row_masks)


def test_planes_that_are_added_say_one_document_all_maskable():
    rows = rows_of(0, 2).with_row_masks(("starts", "noisable_mask"))
    assert rows.row_masks == ("starts", "noisable_mask")
    assert rows.starts.tolist() == [[True, False, False, False]] * 2
    assert rows.noisable_mask.all()
    kept = Rows(rows.tokens, noisable_mask=np.zeros((2, 4), bool)).with_row_masks(("starts", "noisable_mask"))
    assert not kept.noisable_mask.any()


@pytest.mark.parametrize("row_masks", [(), ("starts",)])
def test_concatenated_sources_are_one(row_masks):
    parts = [rows_of(0, 3), rows_of(3, 5, row_masks), rows_of(8, 1)]
    joined = ConcatenatedRows(parts)
    assert (len(joined), joined.length, joined.row_masks) == (9, 4, row_masks)
    indices = np.asarray([8, 0, 4, 4, 3, 7, 2])
    drawn = joined[indices]
    assert drawn.tokens[:, 0].tolist() == indices.tolist()
    assert drawn.row_masks == row_masks
    assert joined[:5].tokens[:, 0].tolist() == [0, 1, 2, 3, 4]


def test_gathering_asks_each_source_once():
    asked = []

    class Source(Rows):
        def __getitem__(self, indices):
            asked.append(indices.tolist())
            return Rows(self.tokens[indices])

    sources = [Source(rows_of(0, 9).tokens), Source(rows_of(100, 9).tokens), Source(rows_of(200, 9).tokens)]
    rows = gather_rows(sources, np.asarray([2, 0, 2, 0]), np.asarray([1, 2, 3, 4]), ())
    assert rows.tokens[:, 0].tolist() == [201, 2, 203, 4]
    assert sorted(asked) == [[1, 3], [2, 4]]
