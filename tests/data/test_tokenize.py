import copy
import pickle
from collections import Counter

import numpy as np
import pytest
from tokenizers import normalizers
from transformers import AutoTokenizer, GPT2TokenizerFast

from dlm_jax.data.records import TextEncoder, boundary_tokens, encode, tokenizer_fingerprint
from dlm_jax.errors import DataError


def test_text_becomes_its_tokens_between_boundaries(bos_tokenizer):
    texts = [f"text number {i} \u00e9" * (i % 5 + 1) for i in range(23)]
    prompt_format = pickle.loads(pickle.dumps(TextEncoder(bos_tokenizer, "text", bos=0, eos=1)))
    span = prompt_format.encode([prompt_format.parse({"text": text})[1] for text in texts], Counter())
    single = [[*bos_tokenizer.encode(text), 1] for text in texts]  # this one adds BOS by itself
    assert span.tokens.tolist() == [token for document in single for token in document]
    assert np.flatnonzero(span.starts).tolist() == np.cumsum([0, *map(len, single[:-1])]).tolist()
    assert span.noisable_mask is None
    assert prompt_format.parse({"text": " \n"}) is None


def test_a_long_text_is_neither_cut_nor_padded(tokenizer):
    texts = ["a" * 5000, "b"]
    tokenizer(texts, truncation=True, max_length=3, padding="max_length") if tokenizer.pad_token else None
    tokenizer("some text", truncation=True, max_length=3)
    assert [len(ids) for ids in encode(tokenizer, texts)] == [5000, 1]


def test_fast_and_slow_tokenizers_go_the_same_road(test_data):
    fast = AutoTokenizer.from_pretrained(test_data / "stories260K_hf")
    texts = ["Once upon a time, there was a girl.", "  two  spaces\n", "\u00e9"]
    assert encode(fast, texts) == [fast.encode(text, add_special_tokens=False) for text in texts]


def test_boundaries_follow_the_tokenizer_unless_told(tokenizer, bos_tokenizer):
    assert boundary_tokens(tokenizer, add_bos=None, document_mask=False) == (None, 1)
    assert boundary_tokens(tokenizer, add_bos=None, document_mask=True) == (0, 1)
    assert boundary_tokens(bos_tokenizer, add_bos=None, document_mask=False) == (0, 1)
    assert boundary_tokens(bos_tokenizer, add_bos=False, document_mask=True) == (None, 1)
    assert boundary_tokens(tokenizer, add_bos=True, document_mask=False) == (0, 1)


def test_missing_boundaries_are_refused(tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.bos_token = None
    assert boundary_tokens(bare, add_bos=None, document_mask=True) == (None, 1)
    with pytest.raises(DataError, match="no BOS"):
        boundary_tokens(bare, add_bos=True, document_mask=False)
    bare.eos_token = None
    with pytest.raises(DataError, match="no EOS"):
        boundary_tokens(bare, add_bos=None, document_mask=False)


def test_fingerprint_changes_with_what_text_becomes_only(tokenizer, bos_tokenizer):
    before = tokenizer_fingerprint(tokenizer)
    tokenizer("some text", truncation=True, max_length=3)
    assert tokenizer_fingerprint(tokenizer) == before
    grown = copy.deepcopy(tokenizer)
    grown.add_tokens("Hello")
    assert tokenizer_fingerprint(grown) != before
    other_eos = copy.deepcopy(tokenizer)
    other_eos.eos_token = "<s>"
    assert tokenizer_fingerprint(other_eos) != before
    normalised = copy.deepcopy(tokenizer)
    normalised.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert tokenizer_fingerprint(normalised) != before  # the same vocabulary, used in another way


def test_a_new_mask_token_leaves_the_fingerprint_alone(tokenizer):
    adapted = copy.deepcopy(tokenizer)
    adapted.add_special_tokens({"mask_token": "<|mask|>"})
    assert len(adapted) == len(tokenizer) + 1
    assert tokenizer_fingerprint(adapted) == tokenizer_fingerprint(tokenizer)


def test_the_real_tokenizers_bring_their_own_habit(test_data):
    bpe = test_data / "gpt2_bpe"
    gpt2 = GPT2TokenizerFast(vocab=str(bpe / "encoder.json"), merges=str(bpe / "vocab.bpe"))
    llama = AutoTokenizer.from_pretrained(test_data / "stories260K_hf")
    assert boundary_tokens(gpt2, add_bos=None, document_mask=False) == (None, 50256)
    assert boundary_tokens(llama, add_bos=None, document_mask=False) == (1, 2)
