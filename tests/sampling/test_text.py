import numpy as np
import pytest
from transformers import GPT2Tokenizer

from dlm_jax.checkpoints.tokenizer import load_tokenizer
from dlm_jax.errors import DataError
from dlm_jax.sampling import GAP, bucket, pad_rows
from dlm_jax.sampling.text import decode, encode, split_gaps
from tests.sampling.tiny_models import byte_tokenizer


@pytest.fixture(scope="module")
def bytes_tokenizer():
    return byte_tokenizer()


def fill(tokenizer, row, gaps, text):
    """Returns `row` with the tokens of `text` in its gaps."""
    filled, tokens = list(row), tokenizer(text, add_special_tokens=False)["input_ids"]
    for gap in gaps:
        for position in gap:
            filled[position] = tokens.pop(0)
    return filled


def test_split_gaps():
    assert split_gaps("The <mask:3> sat<mask>.", 7) == ["The ", 3, " sat", 7, "."]
    assert split_gaps("<mask:2><mask:1>", 7) == ["", 2, "", 1, ""]
    assert split_gaps("He <mask:2-8><mask:3-3> and <mask:5>", 7) == ["He ", range(2, 9), "", 3, " and ", 5, ""]
    assert split_gaps("<mask:x> <mask:2-> <mask>", 7) == ["<mask:x> <mask:2-> ", 7, ""]


@pytest.mark.parametrize(("text", "match"), [
    ("no gap", "no gap.*<mask:8>.*<mask:2-8>"), ("a <mask:0>", "a <mask:0>"), ("a <mask:0-3>", "a <mask:0-3>"),
    ("a <mask:3-0>", "a <mask:3-0>"), ("a <mask:8-2> b", "<mask:8-2>.*<mask:2-8>")])
def test_text_without_valid_gap_is_refused(text, match):
    with pytest.raises(DataError, match=match):
        split_gaps(text, 4)


def test_encode_starts_with_bos_and_returns_gaps(bytes_tokenizer):
    row, gaps = encode(bytes_tokenizer, ["ab", 2, "c", 3, ""], 999)
    assert row[0] == 999
    assert gaps == [range(3, 5), range(6, 9)]
    assert [n for n, token in enumerate(row) if token == GAP] == [3, 4, 6, 7, 8]
    assert encode(bytes_tokenizer, ["ab", 2, "c", range(1, 4), ""], 999) == (row, gaps)  # as long as it may be


def test_given_text_comes_back_exactly(bytes_tokenizer):
    segments = ["  Zoë\r\n said:", 3, "\tдом 🏠  ", 2, " "]
    row, gaps = encode(bytes_tokenizer, segments, bytes_tokenizer.bos_token_id)
    assert decode(bytes_tokenizer, segments, gaps, fill(bytes_tokenizer, row, gaps, " hi?!")) == (
        "  Zoë\r\n said: hi\tдом 🏠  ?! ")


def test_gap_may_end_within_character(bytes_tokenizer):
    row, gaps = encode(bytes_tokenizer, ["a", 1, "", 2, "b"], bytes_tokenizer.bos_token_id)
    text = decode(bytes_tokenizer, ["a", 1, "", 2, "b"], gaps, fill(bytes_tokenizer, row, gaps, "éx"))
    assert text[0] == "a"
    assert text[-2:] == "xb"


def test_space_before_gap_comes_back_once(bytes_tokenizer):
    for segments, text in ((["He ", 4, " and"], " ran"), (["He ", 4], " ran"), (["", 1, "e ", 4, " and"], "H ran")):
        row, gaps = encode(bytes_tokenizer, segments, bytes_tokenizer.bos_token_id)
        bare = [{"He ": "He", "e ": "e"}.get(segment, segment) for segment in segments]
        assert row == encode(bytes_tokenizer, bare, bytes_tokenizer.bos_token_id)[0]
        written = decode(bytes_tokenizer, segments, gaps, fill(bytes_tokenizer, row, gaps, text))
        assert written == "He ran" + (" and" if segments[-1] == " and" else "")
    segments = ["He ", 3, "."]
    row, gaps = encode(bytes_tokenizer, segments, bytes_tokenizer.bos_token_id)
    assert decode(bytes_tokenizer, segments, gaps, fill(bytes_tokenizer, row, gaps, "ran")) == "He ran."


def test_decode_stops_before_stop_token(bytes_tokenizer):
    row, gaps = encode(bytes_tokenizer, ["so", 4], bytes_tokenizer.bos_token_id)
    filled = fill(bytes_tokenizer, row, gaps, "abcd")
    filled[5] = bytes_tokenizer.eos_token_id
    assert decode(bytes_tokenizer, ["so", 4], gaps, filled, [bytes_tokenizer.eos_token_id]) == "soab"


@pytest.mark.parametrize("name", ["stories260K_hf", "llama2_tokenizer", "gpt2_bpe"])
def test_segments_are_one_text_for_real_tokenizers(test_data, name):
    """Text after a gap gets no extra space, and the row decodes to the text that `decode` returns."""
    if name == "gpt2_bpe":
        vocab, merges = (str(test_data / name / file) for file in ("encoder.json", "vocab.bpe"))
        tokenizer = GPT2Tokenizer(vocab=vocab, merges=merges)
    else:
        tokenizer = load_tokenizer(test_data / name)
    for segments in (["Once upon", 3, " there was", 2, ", and so on."], ["", 5, "\n\nThe end"], ["Lily", 3, "s house"]):
        row, gaps = encode(tokenizer, segments, tokenizer.bos_token_id)
        filled = fill(tokenizer, row, gaps, " a time in a big red house far away")
        text = decode(tokenizer, segments, gaps, filled)
        assert text == tokenizer.decode(filled[1:], clean_up_tokenization_spaces=False)
        assert all(segment in text for segment in segments if isinstance(segment, str))


def test_pad_rows():
    padded = pad_rows([[1, 5, GAP, GAP], [1, GAP]], max_length=128)
    assert padded.tokens.shape == (2, 32)
    assert padded.lengths.tolist() == [4, 2]
    assert np.flatnonzero(~padded.fixed[0]).tolist() == [2, 3]
    assert np.flatnonzero(~padded.fixed[1]).tolist() == [1]
    assert padded.tokens[0, :2].tolist() == [1, 5]
    assert padded.tokens.min() == 0


def test_take_is_as_wide_as_its_bucket():
    padded = pad_rows([[1, GAP], [1] * 50, [1, 2, 3]], max_length=60)
    assert padded.tokens.shape == (3, 60)
    batch = padded.take(np.array([2, 0]))
    assert batch.tokens.shape == batch.fixed.shape == (2, 32)
    assert batch.lengths.tolist() == [3, 2]
    assert batch.tokens[0, :3].tolist() == [1, 2, 3]


def test_bucket_is_within_max_length():
    assert bucket(33, 128) == bucket(64, 128) == 64
    assert bucket(100, 101) == 101


def test_coarse_buckets_are_at_most_two_per_doubling():
    widths = {bucket(length, 1 << 20, coarse=True) for length in range(1, 4097)}
    assert sorted(widths) == [32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096]
    padded = pad_rows([[1] * 130 + [GAP] * 3, [1, GAP]], 256, coarse=True)
    assert [padded.take(np.array(rows)).tokens.shape[1] for rows in ([0], [1], [0, 1])] == [192, 32, 192]


def test_row_too_long_or_without_context_is_refused():
    with pytest.raises(DataError, match="text 1 .* 9 tokens.* 8"):
        pad_rows([[1], [1] * 9], max_length=8)
    with pytest.raises(DataError, match="text 0"):
        pad_rows([[GAP, 2]], max_length=8)
