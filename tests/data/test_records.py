import copy
import pickle
from collections import Counter

import numpy as np
import pytest
from tokenizers import normalizers
from transformers import AutoTokenizer

from dlm_jax.data.records import (
    BadRecord,
    TextEncoder,
    get_text,
    parse_record,
)
from dlm_jax.data.tokenization import boundary_tokens, tokenize, tokenizer_fingerprint
from dlm_jax.errors import DataError


@pytest.mark.parametrize("raw", [b"{broken", b'"\xff"', b"7", b"[]", 3, None])
def test_values_that_are_no_records_are_bad(raw):
    with pytest.raises(BadRecord):
        parse_record(raw)


def test_text_of_a_record():
    assert parse_record(b" \n") == "" and parse_record(b'{"a": 1}') == {"a": 1}
    assert get_text("a", "text") == get_text({"text": "a"}, "text") == "a"
    for record in ({"body": "a"}, {"text": None}, {"text": "\ud800"}):
        with pytest.raises(BadRecord):
            get_text(record, "text")


def test_documents_are_encoded_between_boundary_tokens(bos_tokenizer):
    texts = [f"text number {i} \u00e9" * (i % 5 + 1) for i in range(23)]
    encoder = pickle.loads(pickle.dumps(TextEncoder(bos_tokenizer, "text", bos=0, eos=1)))
    span = encoder.encode([encoder.parse({"text": text})[1] for text in texts], Counter())
    documents = [[*bos_tokenizer.encode(text), 1] for text in texts]  # this tokenizer adds BOS by itself
    assert span.tokens.tolist() == [token for document in documents for token in document]
    assert np.flatnonzero(span.starts).tolist() == np.cumsum([0, *map(len, documents[:-1])]).tolist()
    assert span.noisable_mask is None
    assert encoder.parse({"text": " \n"}) is None


def test_tokenize_neither_truncates_nor_pads(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = "</s>"
    tokenizer(["some text"], truncation=True, max_length=3, padding="max_length")  # state that the backend keeps
    assert [len(ids) for ids in tokenize(tokenizer, ["a" * 5000, "b"])] == [5000, 1]


def test_tokenize_matches_transformers(test_data):
    llama = AutoTokenizer.from_pretrained(test_data / "stories260K_hf")
    texts = ["Once upon a time, there was a girl.", "  two  spaces\n", "\u00e9"]
    assert tokenize(llama, texts) == [llama.encode(text, add_special_tokens=False) for text in texts]
    assert boundary_tokens(llama, add_bos=None) == (1, 2)


def test_boundary_tokens_follow_the_tokenizer_by_default(tokenizer, bos_tokenizer):
    assert boundary_tokens(tokenizer, add_bos=None) == (None, 1)
    assert boundary_tokens(tokenizer, add_bos=None, packing="document_mask") == (0, 1)
    assert boundary_tokens(bos_tokenizer, add_bos=None) == (0, 1)
    assert boundary_tokens(bos_tokenizer, add_bos=False, packing="document_mask") == (None, 1)
    assert boundary_tokens(tokenizer, add_bos=True) == (0, 1)


def test_missing_boundary_tokens_are_refused(tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.bos_token = None
    assert boundary_tokens(bare, add_bos=None, packing="document_mask") == (None, 1)
    with pytest.raises(DataError, match="BOS"):
        boundary_tokens(bare, add_bos=True)
    bare.eos_token = None
    with pytest.raises(DataError, match="EOS"):
        boundary_tokens(bare, add_bos=None)


def test_fingerprint_depends_on_token_ids_alone(tokenizer):
    before = tokenizer_fingerprint(tokenizer)
    truncating, grown, other_eos, lower_case, adapted = (copy.deepcopy(tokenizer) for _ in range(5))
    truncating("some text", truncation=True, max_length=3)
    assert tokenizer_fingerprint(truncating) == before
    adapted.add_special_tokens({"mask_token": "<|mask|>"})
    assert len(adapted) == len(tokenizer) + 1 and tokenizer_fingerprint(adapted) == before
    grown.add_tokens("Hello")
    other_eos.eos_token = "<s>"
    lower_case.backend_tokenizer.normalizer = normalizers.Lowercase()  # the same vocabulary, used in another way
    assert before not in map(tokenizer_fingerprint, (grown, other_eos, lower_case))
