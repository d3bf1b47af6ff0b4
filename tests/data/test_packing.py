import jax.numpy as jnp
import numpy as np
import pytest

from dlm_jax.attention.mask import AttentionMask
from dlm_jax.data.packing import pack, positions_of

BOS, EOS = 1, 2


def packed(documents, length, **options):
    blocks = list(pack(documents, length, eos=EOS, **options))
    return [np.concatenate(part) for part in zip(*blocks, strict=True)]


def some_documents(count: int = 40) -> list[list[int]]:
    random = np.random.default_rng(0)
    return [random.integers(3, 99, random.integers(1, 25)).tolist() for _ in range(count)]


@pytest.mark.parametrize("block", [1, 50, 1 << 20])
@pytest.mark.parametrize("bos", [None, BOS])
def test_rows_are_the_stream_of_documents_cut_at_every_length(monkeypatch, block, bos):
    monkeypatch.setattr("dlm_jax.data.packing._BLOCK", block)
    documents = some_documents()
    head = [] if bos is None else [bos]
    stream = [token for document in documents for token in [*head, *document, EOS]]
    rows, segment_ids = packed(documents, 16, bos=bos)
    assert rows.dtype == np.int32
    assert rows.shape == (len(stream) // 16, 16) == segment_ids.shape
    assert rows.ravel().tolist() == stream[: rows.size]


def test_segments_and_positions():
    rows, segment_ids = packed([[5, 6], [7], [8, 9, 10, 11, 12, 13], [14]], 6)
    assert rows.tolist() == [[5, 6, EOS, 7, EOS, 8], [9, 10, 11, 12, 13, EOS]]
    assert segment_ids.tolist() == [[1, 1, 1, 2, 2, 3], [1, 1, 1, 1, 1, 1]]
    assert positions_of(segment_ids).tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]]


def test_attention_under_segments_never_leaves_a_document():
    rows, segment_ids = packed(some_documents(), 32, bos=BOS)
    index = jnp.arange(32)
    allowed = np.asarray(AttentionMask.bidirectional().with_segments(segment_ids).allowed(index, index))
    starts = np.cumsum(rows == BOS, axis=1)  # no document holds BOS inside
    np.testing.assert_array_equal(allowed, starts[:, :, None] == starts[:, None, :])


def test_less_than_a_row_gives_none():
    assert list(pack([[5, 6]], 4, eos=EOS)) == []
