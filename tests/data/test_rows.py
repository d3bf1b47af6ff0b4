import numpy as np
import pytest

from dlm_jax.data.rows import (
    ConcatenatedRows,
    RowPacker,
    Rows,
    TokenSpan,
    gather_rows,
    positions_from_starts,
    segment_ids_from_starts,
)

BOS, EOS = 1, 2
MASKS = ("starts", "noisable_mask")


def make_rows(first: int, count: int, row_masks: tuple[str, ...] = ()) -> Rows:
    return Rows(np.arange(first, first + count)[:, None] + np.zeros(4, np.int32)).with_row_masks(row_masks)


def make_span(documents: list[list[int]], prefix: list[int] = ()) -> TokenSpan:
    wrapped = [[*prefix, *document, EOS] for document in documents]
    starts = [index == 0 for document in wrapped for index in range(len(document))]
    return TokenSpan(np.concatenate(wrapped).astype(np.uint32), np.asarray(starts, bool))


def pack(documents, length: int, spans: int = 1, prefix: list[int] = ()) -> Rows:
    """Packs the documents from a number of spans; half of these through a second packer."""
    packer, made = RowPacker(length), []
    for number, indices in enumerate(np.array_split(np.arange(len(documents)), spans)):
        if number == spans // 2:
            resumed = RowPacker(length)
            resumed.remainder = packer.remainder
            packer = resumed
        made.append(packer.add(make_span([documents[i] for i in indices], prefix)))
    return Rows(np.concatenate([rows.tokens for rows in made]), np.concatenate([rows.starts for rows in made]))


def random_documents(count: int = 40) -> list[list[int]]:
    random = np.random.default_rng(0)
    return [random.integers(3, 99, random.integers(1, 25)).tolist() for _ in range(count)]


def test_added_masks_mean_one_noisable_document():
    rows = make_rows(0, 2).with_row_masks(MASKS)
    assert rows.row_masks == MASKS
    assert rows.starts.tolist() == [[True, False, False, False]] * 2
    assert rows.noisable_mask.all()
    assert not Rows(rows.tokens, noisable_mask=np.zeros((2, 4), bool)).with_row_masks(MASKS).noisable_mask.any()


@pytest.mark.parametrize("row_masks", [(), ("starts",)])
def test_concatenated_rows_index_as_one_source(row_masks):
    joined = ConcatenatedRows([make_rows(0, 3), make_rows(3, 5, row_masks), make_rows(8, 1)])
    assert (len(joined), joined.length, joined.row_masks) == (9, 4, row_masks)
    indices = np.asarray([8, 0, 4, 4, 3, 7, 2])
    found = joined[indices]
    assert found.tokens[:, 0].tolist() == indices.tolist() and found.row_masks == row_masks
    assert joined[:5].tokens[:, 0].tolist() == [0, 1, 2, 3, 4]


def test_gather_asks_each_source_once():
    asked = []

    class Source(Rows):
        def __getitem__(self, indices):
            asked.append(indices.tolist())
            return Rows(self.tokens[indices])

    sources = [Source(make_rows(first, 9).tokens) for first in (0, 100, 200)]
    rows = gather_rows(sources, np.asarray([2, 0, 2, 0]), np.asarray([1, 2, 3, 4]), ())
    assert rows.tokens[:, 0].tolist() == [201, 2, 203, 4]
    assert sorted(asked) == [[1, 3], [2, 4]]


@pytest.mark.parametrize("prefix", [[], [BOS]])
@pytest.mark.parametrize("spans", [1, 7, 40])
def test_packed_rows_are_the_stream_of_documents(spans, prefix):
    documents = random_documents()
    stream = [token for document in documents for token in [*prefix, *document, EOS]]
    rows = pack(documents, 16, spans, prefix)
    assert rows.tokens.shape == (len(stream) // 16, 16) == rows.starts.shape
    assert rows.tokens.ravel().tolist() == stream[: rows.tokens.size]
    np.testing.assert_array_equal(rows.starts, pack(documents, 16, 1, prefix).starts)


def test_packer_keeps_the_remainder():
    packer = RowPacker(4)
    assert len(packer.add(make_span([[5, 6]]))) == 0
    assert packer.remainder.tokens.tolist() == [5, 6, EOS]
    assert packer.remainder.starts.tolist() == [True, False, False]


def test_segment_ids_and_positions():
    rows = pack([[5, 6], [7], [8, 9, 10, 11, 12, 13], [14]], 6)
    assert rows.tokens.tolist() == [[5, 6, EOS, 7, EOS, 8], [9, 10, 11, 12, 13, EOS]]
    assert segment_ids_from_starts(rows.starts).tolist() == [[1, 1, 1, 2, 2, 3], [1, 1, 1, 1, 1, 1]]
    assert positions_from_starts(rows.starts).tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]]
