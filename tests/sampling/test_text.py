import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Tokenizer, PreTrainedTokenizerFast

from dlm_jax.checkpoints.tokenizer import load_tokenizer
from dlm_jax.errors import DataError
from dlm_jax.sampling import GAP
from dlm_jax.sampling.text import decode, encode, split_gaps


@pytest.fixture(scope="module")
def bytes_tokenizer():
    """One token a byte, and a special token that ends a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", bos_token="<end>")


def fill(tokenizer, row, gaps, text):
    """`row` with the tokens of `text` as far as they go in its gaps."""
    filled, tokens = list(row), tokenizer(text, add_special_tokens=False)["input_ids"]
    for gap in gaps:
        for position in gap:
            filled[position] = tokens.pop(0)
    return filled


def test_marks_become_gaps():
    assert split_gaps("The <mask:3> sat<mask>.", 7) == ["The ", 3, " sat", 7, "."]
    assert split_gaps("<mask:2><mask:1>", 7) == ["", 2, "", 1, ""]
    assert split_gaps("He <mask:2-8><mask:3-3> and <mask:5>", 7) == ["He ", range(2, 9), "", 3, " and ", 5, ""]
    assert split_gaps("<mask:x> <mask:2-> <mask>", 7) == ["<mask:x> <mask:2-> ", 7, ""]


@pytest.mark.parametrize(("text", "word"), [
    ("no mark", "no gap in 'no mark'; write <mask:8> where 8 tokens are to be filled in, or <mask:2-8> where 2 to 8"),
    ("a <mask:0>", "a gap of no tokens in 'a <mask:0>'"), ("a <mask:0-3>", "at least 1 token"),
    ("a <mask:3-0>", "at least 1 token"), ("a <mask:8-2> b", "range of <mask:8-2> in .* is empty; write <mask:2-8>")])
def test_a_text_without_a_gap_to_fill_is_refused(text, word):
    with pytest.raises(DataError, match=word):
        split_gaps(text, 4)


def test_the_row_begins_with_bos_and_gaps_lie_where_they_are_said_to(bytes_tokenizer):
    row, gaps = encode(bytes_tokenizer, ["ab", 2, "c", 3, ""], 999)
    assert row[0] == 999
    assert gaps == [range(3, 5), range(6, 9)]
    assert [n for n, token in enumerate(row) if token == GAP] == [3, 4, 6, 7, 8]
    assert encode(bytes_tokenizer, ["ab", 2, "c", range(1, 4), ""], 999) == (row, gaps)  # as long as it may be


def test_what_was_written_comes_back_character_for_character(bytes_tokenizer):
    pieces = ["  Zoë\r\n said:", 3, "\tдом 🏠  ", 2, " "]
    row, gaps = encode(bytes_tokenizer, pieces, bytes_tokenizer.bos_token_id)
    assert decode(bytes_tokenizer, pieces, gaps, fill(bytes_tokenizer, row, gaps, " hi?!")) == (
        "  Zoë\r\n said: hi\tдом 🏠  ?! ")


def test_a_gap_may_end_within_a_character(bytes_tokenizer):
    row, gaps = encode(bytes_tokenizer, ["a", 1, "", 2, "b"], bytes_tokenizer.bos_token_id)
    text = decode(bytes_tokenizer, ["a", 1, "", 2, "b"], gaps, fill(bytes_tokenizer, row, gaps, "éx"))
    assert text[0] == "a"
    assert text[-2:] == "xb"


def test_a_space_before_a_gap_is_left_to_the_gap_and_comes_back_once(bytes_tokenizer):
    for pieces, text in ((["He ", 4, " and"], " ran"), (["He ", 4], " ran"), (["", 1, "e ", 4, " and"], "H ran")):
        row, gaps = encode(bytes_tokenizer, pieces, bytes_tokenizer.bos_token_id)
        bare = [{"He ": "He", "e ": "e"}.get(piece, piece) for piece in pieces]
        assert row == encode(bytes_tokenizer, bare, bytes_tokenizer.bos_token_id)[0]
        written = decode(bytes_tokenizer, pieces, gaps, fill(bytes_tokenizer, row, gaps, text))
        assert written == "He ran" + (" and" if pieces[-1] == " and" else "")
    pieces = ["He ", 3, "."]
    row, gaps = encode(bytes_tokenizer, pieces, bytes_tokenizer.bos_token_id)
    assert decode(bytes_tokenizer, pieces, gaps, fill(bytes_tokenizer, row, gaps, "ran")) == "He ran."


def test_text_ends_before_the_stop_token(bytes_tokenizer):
    row, gaps = encode(bytes_tokenizer, ["so", 4], bytes_tokenizer.bos_token_id)
    filled = fill(bytes_tokenizer, row, gaps, "abcd")
    filled[5] = bytes_tokenizer.eos_token_id
    assert decode(bytes_tokenizer, ["so", 4], gaps, filled, [bytes_tokenizer.eos_token_id]) == "soab"


@pytest.mark.parametrize("name", ["stories260K_hf", "llama2_tokenizer", "gpt2_bpe"])
def test_pieces_are_tokens_of_one_text_for_real_tokenizers(test_data, name):
    """Text after a gap gets no space of its own, and the row decodes to the text that is handed back."""
    if name == "gpt2_bpe":
        vocab, merges = (str(test_data / name / file) for file in ("encoder.json", "vocab.bpe"))
        tokenizer = GPT2Tokenizer(vocab=vocab, merges=merges)
    else:
        tokenizer = load_tokenizer(test_data / name)
    for pieces in (["Once upon", 3, " there was", 2, ", and so on."], ["", 5, "\n\nThe end"], ["Lily", 3, "s house"]):
        row, gaps = encode(tokenizer, pieces, tokenizer.bos_token_id)
        filled = fill(tokenizer, row, gaps, " a time in a big red house far away")
        text = decode(tokenizer, pieces, gaps, filled)
        assert text == tokenizer.decode(filled[1:], clean_up_tokenization_spaces=False)
        assert all(piece in text for piece in pieces if isinstance(piece, str))
