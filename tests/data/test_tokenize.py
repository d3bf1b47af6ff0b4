import copy

import pytest
from transformers import AutoTokenizer, GPT2TokenizerFast

from dlm_jax.data.tokenize import boundary_tokens, encode, fingerprint
from dlm_jax.errors import DataError


def test_batches_give_what_single_texts_give(bos_tokenizer):
    texts = [f"text number {i} é" * (i % 5) for i in range(23)]
    single = [bos_tokenizer.encode(text, add_special_tokens=False) for text in texts]
    assert list(encode(iter(texts), bos_tokenizer, batch_size=4)) == single


def test_boundaries_follow_the_tokenizer_unless_told(tokenizer, bos_tokenizer):
    assert boundary_tokens(tokenizer, add_bos=None, segments=False) == (None, 1)
    assert boundary_tokens(tokenizer, add_bos=None, segments=True) == (0, 1)
    assert boundary_tokens(bos_tokenizer, add_bos=None, segments=False) == (0, 1)
    assert boundary_tokens(bos_tokenizer, add_bos=False, segments=True) == (None, 1)
    assert boundary_tokens(tokenizer, add_bos=True, segments=False) == (0, 1)


def test_missing_boundaries_are_refused(tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.bos_token = None
    assert boundary_tokens(bare, add_bos=None, segments=True) == (None, 1)
    with pytest.raises(DataError, match="no BOS"):
        boundary_tokens(bare, add_bos=True, segments=False)
    bare.eos_token = None
    with pytest.raises(DataError, match="no EOS"):
        boundary_tokens(bare, add_bos=None, segments=False)


def test_fingerprint_changes_with_the_vocabulary_only(tokenizer, bos_tokenizer):
    before = fingerprint(tokenizer)
    tokenizer("some text", truncation=True, max_length=3)
    assert fingerprint(tokenizer) == before != fingerprint(bos_tokenizer)
    grown = copy.deepcopy(tokenizer)
    grown.add_tokens("<|mask|>")
    assert fingerprint(grown) != before


def test_the_real_tokenizers_bring_their_own_habit(test_data):
    bpe = test_data / "gpt2_bpe"
    gpt2 = GPT2TokenizerFast(vocab=str(bpe / "encoder.json"), merges=str(bpe / "vocab.bpe"))
    llama = AutoTokenizer.from_pretrained(test_data / "stories260K_hf")
    assert boundary_tokens(gpt2, add_bos=None, segments=False) == (None, 50256)
    assert boundary_tokens(llama, add_bos=None, segments=False) == (1, 2)
