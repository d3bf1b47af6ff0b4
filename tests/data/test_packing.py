from collections import Counter

import jax.numpy as jnp
import numpy as np
import pytest

from dlm_jax.attention.mask import AttentionMask
from dlm_jax.data.records import TokenSpan
from dlm_jax.data.rows import RowPacker, Rows, positions_from_starts, segment_ids_from_starts

BOS, EOS = 1, 2


def piece_of(documents: list[list[int]], head: list[int] = ()) -> TokenSpan:
    wrapped = [[*head, *document, EOS] for document in documents]
    starts = [at == 0 for document in wrapped for at in range(len(document))]
    return TokenSpan(np.concatenate(wrapped).astype(np.uint32), np.asarray(starts, bool))


def packed(documents, length: int, spans: int = 1, head: list[int] = ()) -> Rows:
    """All documents through one packer, in so many pieces."""
    packer = RowPacker(length)
    made = [packer.add(piece_of([documents[i] for i in part], head))
            for part in np.array_split(np.arange(len(documents)), spans)]
    return Rows(np.concatenate([rows.tokens for rows in made]), np.concatenate([rows.starts for rows in made]))


def some_documents(count: int = 40) -> list[list[int]]:
    random = np.random.default_rng(0)
    return [random.integers(3, 99, random.integers(1, 25)).tolist() for _ in range(count)]


@pytest.mark.parametrize("head", [[], [BOS]])
@pytest.mark.parametrize("pieces", [1, 7, 40])
def test_rows_are_the_stream_of_documents_cut_at_every_length(spans, head):
    documents = some_documents()
    stream = [token for document in documents for token in [*head, *document, EOS]]
    rows = packed(documents, 16, spans, head)
    assert rows.tokens.shape == (len(stream) // 16, 16) == rows.starts.shape
    assert rows.tokens.ravel().tolist() == stream[: rows.tokens.size]


def test_what_is_left_over_can_be_carried_to_another_packer():
    documents, whole = some_documents(), packed(some_documents(), 16)
    first = RowPacker(16)
    rows = [first.add(piece_of(documents[:13]))]
    rows.append(RowPacker(16, first.remainder).add(piece_of(documents[13:])))
    np.testing.assert_array_equal(np.concatenate([part.tokens for part in rows]), whole.tokens)
    np.testing.assert_array_equal(np.concatenate([part.starts for part in rows]), whole.starts)


def test_segments_and_positions():
    rows = packed([[5, 6], [7], [8, 9, 10, 11, 12, 13], [14]], 6)
    assert rows.tokens.tolist() == [[5, 6, EOS, 7, EOS, 8], [9, 10, 11, 12, 13, EOS]]
    assert segment_ids_from_starts(rows.starts).tolist() == [[1, 1, 1, 2, 2, 3], [1, 1, 1, 1, 1, 1]]
    assert positions_from_starts(rows.starts).tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]]


def test_attention_under_segments_never_leaves_a_document():
    rows = packed(some_documents(), 32, head=[BOS])
    index = jnp.arange(32)
    segment_ids = segment_ids_from_starts(rows.starts)
    allowed = np.asarray(AttentionMask.bidirectional().with_segments(segment_ids).allowed(index, index))
    document = np.cumsum(rows.tokens == BOS, axis=1)  # no document holds BOS inside
    np.testing.assert_array_equal(allowed, document[:, :, None] == document[:, None, :])


def test_less_than_a_row_gives_none_and_is_kept():
    packer = RowPacker(4)
    assert len(packer.add(piece_of([[5, 6]]))) == 0
    assert packer.remainder.tokens.tolist() == [5, 6, EOS]
    assert Counter(packer.remainder.starts.tolist()) == {True: 1, False: 2}
