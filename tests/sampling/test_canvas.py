import numpy as np
import pytest

from dlm_jax.errors import DataError
from dlm_jax.sampling import GAP, bucket, pad_rows


def test_rows_are_padded_and_padding_is_fixed():
    padded = pad_rows([[1, 5, GAP, GAP], [1, GAP]], max_length=128)
    assert padded.tokens.shape == (2, 32)
    assert padded.lengths.tolist() == [4, 2]
    assert np.flatnonzero(~padded.fixed[0]).tolist() == [2, 3]
    assert np.flatnonzero(~padded.fixed[1]).tolist() == [1]
    assert padded.tokens[0, :2].tolist() == [1, 5]
    assert padded.tokens.min() == 0


def test_rows_taken_together_are_as_wide_as_their_bucket():
    padded = pad_rows([[1, GAP], [1] * 50, [1, 2, 3]], max_length=60)
    assert padded.tokens.shape == (3, 60)
    part = padded.take(np.array([2, 0]))
    assert part.tokens.shape == part.fixed.shape == (2, 32)
    assert part.lengths.tolist() == [3, 2]
    assert part.tokens[0, :3].tolist() == [1, 2, 3]


def test_similar_lengths_share_a_bucket_within_the_model_s_length():
    assert bucket(33, 128) == bucket(64, 128) == 64
    assert bucket(100, 101) == 101


def test_coarse_buckets_are_at_most_two_in_a_doubling():
    widths = {bucket(length, 1 << 20, coarse=True) for length in range(1, 4097)}
    assert sorted(widths) == [32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096]
    padded = pad_rows([[1] * 130 + [GAP] * 3, [1, GAP]], 256, coarse=True)
    assert [padded.take(np.array(rows)).tokens.shape[1] for rows in ([0], [1], [0, 1])] == [192, 32, 192]


def test_a_row_too_long_or_without_context_is_refused():
    with pytest.raises(DataError, match="text 1 has 9 tokens, gaps included, and the model takes at most 8"):
        pad_rows([[1], [1] * 9], max_length=8)
    with pytest.raises(DataError, match="text 0 begins with a gap"):
        pad_rows([[GAP, 2]], max_length=8)
