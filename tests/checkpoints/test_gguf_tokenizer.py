"""Tokenizers in GGUF files, beside those of the models that have their vocabularies."""

import json

import numpy as np
import pytest
import sentencepiece
from tokenizers.pre_tokenizers import ByteLevel
from transformers import GPT2Tokenizer

from dlm_jax.checkpoints import load_pretrained, save_pretrained
from dlm_jax.checkpoints.gguf_tokenizer import PRE_TOKENIZERS, build_tokenizer
from dlm_jax.checkpoints.tokenizer import load_tokenizer, save_tokenizer
from dlm_jax.cli.main import main
from dlm_jax.data.tokenization import PROBE, adds_bos, is_rendered, missing_ids, start_token, tokenize
from dlm_jax.errors import CheckpointError
from tests.checkpoints import gguf_files

TEXTS = [*PROBE, "Room 101, 25% of 3.14159  ", "\n\n\nx  = 12\n", "I'll we'VE it's", "二〇二四年１２月 ½"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


@pytest.fixture(scope="module")
def gpt2(test_data):
    """The metadata of a byte-level tokenizer, with GPT-2's vocabulary and two special tokens after it."""
    vocabulary = json.loads((test_data / "gpt2_bpe" / "encoder.json").read_text())
    tokens = [*sorted(vocabulary, key=vocabulary.get), "<|im_start|>", "<|im_end|>", "<think>", "[PAD50260]"]
    merges = (test_data / "gpt2_bpe" / "vocab.bpe").read_text().splitlines()[1:]
    kinds = [1] * 50256 + [3, 3, 3, 4, 5]
    return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": kinds, "tokenizer.ggml.merges": merges,
            "tokenizer.ggml.bos_token_id": 50256, "tokenizer.ggml.eos_token_id": 50258,
            "tokenizer.chat_template": TEMPLATE}


@pytest.fixture
def small():
    """The same with a vocabulary of bytes and one special token."""
    return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2",
            "tokenizer.ggml.tokens": [*sorted(ByteLevel.alphabet()), "<s>"],
            "tokenizer.ggml.token_type": [1] * 256 + [3], "tokenizer.ggml.merges": [],
            "tokenizer.ggml.bos_token_id": 256, "tokenizer.ggml.eos_token_id": 256}


@pytest.fixture(scope="module")
def reference(test_data):
    return GPT2Tokenizer(vocab=str(test_data / "gpt2_bpe" / "encoder.json"),
                         merges=str(test_data / "gpt2_bpe" / "vocab.bpe"))


@pytest.fixture(scope="module")
def llama2(test_data):
    """The metadata of LLaMA 2's tokenizer, and sentencepiece with its model."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(test_data / "llama2_tokenizer" / "tokenizer.model"))
    ids = range(len(model))
    kinds = [2 if model.is_unknown(i) else 3 if model.is_control(i) else 6 if model.is_byte(i) else 1 for i in ids]
    return {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": [model.id_to_piece(i) for i in ids],
            "tokenizer.ggml.scores": [model.get_score(i) for i in ids], "tokenizer.ggml.token_type": kinds,
            "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.ggml.unknown_token_id": 0}, model


def build(metadata, path, **changes):
    settings = {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    return build_tokenizer({key: value for key, value in (metadata | settings).items() if value is not None}, path)


def test_gpt2(gpt2, reference, tmp_path):
    tokenizer = build(gpt2, tmp_path)
    assert tokenize(tokenizer, TEXTS) == tokenize(reference, TEXTS)
    assert [tokenizer.decode(row) for row in tokenize(tokenizer, TEXTS)] == TEXTS
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (50256, 50258)
    assert not adds_bos(tokenizer) and start_token(tokenizer) == 50258
    assert adds_bos(build(gpt2, tmp_path, add_bos_token=True))
    # Files of before pre-tokenizers had names can only be trusted if they are GPT-2.
    old = build(gpt2 | {"general.architecture": "gpt2"}, tmp_path, pre=None)
    assert tokenize(old, TEXTS) == tokenize(reference, TEXTS)


def test_special_tokens(gpt2, tmp_path):
    tokenizer = build(gpt2, tmp_path)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert text.startswith("<|im_start|>user\nHi<|im_end|>") and is_rendered(tokenizer, text)
    ids, = tokenize(tokenizer, [text], special_tokens=True)
    assert ids[0] == 50257 and 50258 in ids
    assert not {50256, 50257, 50258} & set(tokenize(tokenizer, [text])[0])  # in running text it is text
    assert tokenizer.convert_tokens_to_ids("<think>") == 50259
    assert tokenize(tokenizer, ["a<think>b"])[0][1] == 50259
    assert missing_ids(tokenizer, 50262) == (range(50260, 50262),)  # what only fills up the embedding


@pytest.mark.parametrize(("pre", "text", "words"), [
    ("smollm", "in 1234  567", ["in", " ", "1", "2", "3", "4", "  ", "5", "6", "7"]),
    ("gpt-2", "in 1234  567", ["in", " 1234", " ", " 567"]),
    ("llama-bpe", "in 1234  567\n\nx'LL", ["in", " ", "123", "4", " ", " ", "567", "\n\n", "x", "'LL"]),
    ("qwen2", "in 1234 x.y()\n", ["in", " ", "1", "2", "3", "4", " x", ".y", "()\n"]),
    ("tekken", "in 12 HelloWorld a/\n", ["in", " ", "1", "2", " Hello", "World", " a", "/\n"]),
    ("deepseek-coder", "in 12\n你好 +x", ["in", " ", "1", "2", "\n", "你好", " +", "x"]),
])
def test_pre_tokenizers_split(pre, text, words, small, tmp_path):
    backend = build(small, tmp_path, pre=pre).backend_tokenizer
    assert [text[slice(*span)] for _, span in backend.pre_tokenizer.pre_tokenize_str(text)] == words


def test_bos_by_default_of_the_pre_tokenizer(small, tmp_path):
    assert {name for name in PRE_TOKENIZERS if adds_bos(build(small, tmp_path, pre=name))} >= {"llama-bpe", "tekken"}
    assert not adds_bos(build(small, tmp_path, pre="llama-bpe", add_bos_token=False))


def test_characters_are_composed_for_qwen2(small, tmp_path):
    composed, apart = tokenize(build(small, tmp_path, pre="qwen2"), ["\u00c0", "A\u0300"])
    assert composed == apart
    composed, apart = tokenize(build(small, tmp_path, pre="smollm"), ["\u00c0", "A\u0300"])
    assert composed != apart


def test_sentencepiece(llama2, test_data, tmp_path):
    metadata, model = llama2
    tokenizer = build(metadata, tmp_path)
    stories = json.loads((test_data / "tinystories" / "stories_900.json").read_text())[:100]
    code = (test_data / "wiki_demo" / "wiki_demo.txt").read_text().split("\n")[:300]
    texts = [text for text in [*TEXTS, *stories, *code, "<s> a </s>"] if text]
    assert tokenize(tokenizer, texts) == model.encode(texts)
    assert [tokenizer.decode(row) for row in tokenize(tokenizer, TEXTS)] == model.decode(model.encode(TEXTS))
    assert adds_bos(tokenizer) and tokenizer.encode("a")[0] == 1
    assert tokenizer.decode(build(metadata, tmp_path, add_space_prefix=False).encode("a")[1:]) == "a"


def test_model_and_its_export_have_the_same_tokenizer(gpt2, tmp_path, reference):
    model = gguf_files.make("llama")
    rows = np.random.default_rng(0).normal(size=(50264, 256)).astype(np.float32)
    gguf_files.write(model, path := tmp_path / "x.gguf", metadata=gpt2,
                     tensors={"token_embd.weight": rows, "output.weight": None})
    loaded = load_pretrained(path, mask_token="<|mask|>")
    assert (loaded.eos_token_id, loaded.start_token_id) == (50258, 50258)
    assert loaded.new_mask_token and loaded.diffusion.mask_token_id == 50260
    assert loaded.diffusion.missing_ids == (range(50261, 50264),)
    save_pretrained(tmp_path / "out", loaded)
    again = load_pretrained(tmp_path / "out")
    assert tokenize(again.tokenizer, TEXTS) == tokenize(loaded.tokenizer, TEXTS) == tokenize(reference, TEXTS)
    assert again.tokenizer.chat_template == TEMPLATE

    (tmp_path / "text.txt").write_text("Once upon a time 12 dogs.\n" * 50)
    arguments = ["prepare", f"--data={tmp_path / 'text.txt'}", "--config.data.length=16", "--workers=0",
                 "--config.data.validation_fraction=0"]
    for name, source in (("a", path), ("b", tmp_path / "out")):
        assert main([*arguments, f"--tokenizer={source}", f"--output={tmp_path / name}"]) == 0
    read = [json.loads((tmp_path / name / "manifest.json").read_text()) for name in "ab"]
    assert read[0]["tokenizer"]["fingerprint"] == read[1]["tokenizer"]["fingerprint"]
    assert read[0]["splits"] == read[1]["splits"]


def test_saved_tokenizer_is_read_as_it_is(llama2, tmp_path):
    tokenizer = build(llama2[0], tmp_path)
    save_tokenizer(tokenizer, tmp_path / "out")
    again = load_tokenizer(tmp_path / "out")
    assert tokenize(again, TEXTS) == tokenize(tokenizer, TEXTS) and again.encode("a") == tokenizer.encode("a")


@pytest.mark.parametrize(("changes", "mentions"), [
    ({"pre": "glm4"}, "glm4"),
    ({"pre": None}, r"tokenizer\.ggml\.pre"),
    ({"model": "t5"}, "t5"),
    ({"merges": None}, "merges"),
    ({"merges": ["a zzzzzzzz"]}, "zzzzzzzz"),
    ({"token_type": [1]}, "token types"),
    ({"eos_token_id": 99_999}, "99999"),
    ({"model": "llama", "merges": None}, "scores"),
])
def test_what_cannot_be_read_is_refused(changes, mentions, small, tmp_path):
    with pytest.raises(CheckpointError, match=mentions):
        build(small, tmp_path / "x.gguf", **changes)
    assert build(small, tmp_path, model="none") is None
