import json
import shutil

import pytest
import sentencepiece
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dlm_jax.checkpoints.tokenizer import choose_mask_token, load_tokenizer
from dlm_jax.data.tokenization import id_limit, missing_ids, tokenize
from dlm_jax.errors import CheckpointError

TEXT = "Once upon a time, there was a\nlittle girl."


def test_bare_sentencepiece_model(tmp_path, test_data):
    model = test_data / "llama2_tokenizer" / "tokenizer.model"
    shutil.copy(model, tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    expected = sentencepiece.SentencePieceProcessor(model_file=str(model)).encode(TEXT)
    assert tokenizer.encode(TEXT) == [1, *expected]
    assert tokenizer.decode(tokenizer.encode(TEXT), skip_special_tokens=True) == TEXT
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer)) == (1, 2, 32000)


def test_gpt2_vocabulary_and_merges(tmp_path, test_data):
    shutil.copy(test_data / "gpt2_bpe" / "encoder.json", tmp_path / "vocab.json")
    shutil.copy(test_data / "gpt2_bpe" / "vocab.bpe", tmp_path / "merges.txt")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == 50256


@pytest.mark.parametrize("where", ["config.json", "tokenizer_config.json"])
def test_remote_code_is_not_run(where, tmp_path, test_data, monkeypatch, capfd):
    shutil.copy(test_data / "gpt2_bpe" / "encoder.json", tmp_path / "vocab.json")
    shutil.copy(test_data / "gpt2_bpe" / "vocab.bpe", tmp_path / "merges.txt")
    settings = {"config.json": {"model_type": "Fast_dLLM_Qwen", "rope_scaling": None},
                "tokenizer_config.json": {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|endoftext|>"}}
    settings[where]["auto_map"] = {"config.json": {"AutoConfig": "remote.Config"},
                                   "tokenizer_config.json": {"AutoTokenizer": ["remote.Tokenizer", None]}}[where]
    for file, values in settings.items():
        (tmp_path / file).write_text(json.dumps(values))
    (tmp_path / "remote.py").write_text("raise SystemExit('run')")
    monkeypatch.setattr("builtins.input", lambda _: pytest.fail("asked"))
    tokenizer = load_tokenizer(tmp_path)
    assert type(tokenizer).__name__.startswith("Qwen2Tokenizer")
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert capfd.readouterr().err == ""


def test_tokenizer_of_dream(tmp_path, test_data):
    """Its class is its own, and its files are Qwen2's."""
    shutil.copy(test_data / "gpt2_bpe" / "encoder.json", tmp_path / "vocab.json")
    shutil.copy(test_data / "gpt2_bpe" / "vocab.bpe", tmp_path / "merges.txt")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "Dream"}))
    mask = dict(content="<|mask|>", lstrip=False, normalized=False, rstrip=False, single_word=False, special=True)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(dict(
        tokenizer_class="DreamTokenizer", auto_map={"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        added_tokens_decoder={"50257": mask}, mask_token="<|mask|>", eos_token="<|endoftext|>")))
    tokenizer = load_tokenizer(tmp_path)
    assert type(tokenizer).__name__.startswith("Qwen2Tokenizer") and tokenizer.mask_token_id == 50257
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


def test_missing_and_damaged_tokenizer(tmp_path):
    assert load_tokenizer(tmp_path) is None
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        load_tokenizer(tmp_path)


@pytest.fixture
def tokenizer(test_data):
    return load_tokenizer(test_data / "stories260K_hf")


def test_existing_mask_token_by_id_or_text(tokenizer):
    assert choose_mask_token(409, None, 512, tokenizer) == (409, False)
    assert choose_mask_token(tokenizer.convert_ids_to_tokens(409), None, 512, tokenizer) == (409, False)
    assert tokenizer.mask_token_id is None


def test_new_mask_token_is_added(tokenizer):
    assert choose_mask_token("<|mask|>", None, 512, tokenizer) == (512, True)
    assert tokenizer.decode([403, 512, 407], skip_special_tokens=True).split() == ["Once", "upon"]
    assert choose_mask_token(None, None, 513, tokenizer) == (512, False)


def test_config_precedes_tokenizer(tokenizer):
    tokenizer.add_special_tokens({"mask_token": "<|mask|>"})
    assert choose_mask_token(None, 3, 513, tokenizer) == (3, False)
    assert choose_mask_token(4, 3, 513, tokenizer) == (4, False)
    assert choose_mask_token(None, None, 513, None) == (None, False)


SPACES = [" " * n + "x" + " " * n for n in range(20)]
TEXTS = [
    *SPACES, "def f(x):\n    return x  # two", "| a  |  1.50 |", "3.14 12345",
    "na\u00efve \u4f60\u597d \U0001f642", "</s> <s>", "<unk> a<unk>", "",
]


@pytest.mark.parametrize("name", ["llama2_tokenizer", "stories260K_hf"])
def test_ids_are_those_of_sentencepiece(tmp_path, test_data, name):
    shutil.copy(test_data / name / "tokenizer.model", tmp_path)
    own = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert tokenize(load_tokenizer(tmp_path), TEXTS) == own.encode(TEXTS)


@pytest.mark.parametrize("legacy", [True, False])
def test_space_after_special_tokens(tmp_path, test_data, legacy):
    """sentencepiece's space before a text: with `legacy` also after a special token."""
    shutil.copy(test_data / "llama2_tokenizer" / "tokenizer.model", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", "legacy": legacy}))
    tokenizer, own = load_tokenizer(tmp_path), sentencepiece.SentencePieceProcessor(str(tmp_path / "tokenizer.model"))
    assert tokenize(tokenizer, TEXTS) == own.encode(TEXTS)
    for text in ("a", " a", "  a", "[INST] x", "\nA"):
        after = own.encode(text) if legacy else own.encode("\n" + text)[len(own.encode("\n")):]
        assert tokenize(tokenizer, [f" b<s>{text}"], special_tokens=True) == [[*own.encode(" b"), 1, *after]]


@pytest.mark.parametrize("kind, rule", [("bpe", "nmt_nfkc"), ("unigram", "nmt_nfkc"), ("unigram", "nmt_nfkc_cf"),
                                        ("bpe", "identity")])
def test_ids_of_a_new_sentencepiece_model(tmp_path, kind, rule):
    (tmp_path / "text").write_text("\n".join([*SPACES, *TEXTS, TEXT] * 5))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "tokenizer"), vocab_size=300, model_type=kind,
        byte_fallback=True, hard_vocab_limit=False, minloglevel=3, normalization_rule_name=rule)
    own = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert tokenize(load_tokenizer(tmp_path), TEXTS) == own.encode(TEXTS)


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "qwen2"])
@pytest.mark.parametrize("normalizer", [normalizers.Lowercase(), normalizers.Prepend("_"), None])
def test_ids_are_those_of_tokenizer_json_whatever_the_architecture(tmp_path, model_type, normalizer):
    raw = Tokenizer(models.BPE())
    if normalizer is not None:
        raw.normalizer = normalizer
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.train_from_iterator(TEXTS * 5, trainers.BpeTrainer(
        vocab_size=400, special_tokens=["</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    raw.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>"}')
    raw.encode_special_tokens = True
    assert tokenize(load_tokenizer(tmp_path), TEXTS) == [found.ids for found in raw.encode_batch(TEXTS)]


@pytest.mark.parametrize("ids", [(0, 1, 2, 4), (0, 1, 2, 70000), (3, 5, 7, 9)])
def test_new_token_takes_an_id_that_no_token_has(ids):
    backend = Tokenizer(models.WordLevel(dict(zip(("<unk>", "</s>", "a", "b"), ids, strict=True)), unk_token="<unk>"))
    sparse = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    assert choose_mask_token("<mask>", None, 80000, sparse) == (ids[-1] + 1, True)
    assert sparse.get_vocab()["b"] == ids[-1] and id_limit(sparse) == ids[-1] + 2
    holes = missing_ids(sparse, 80000)
    assert sum(map(len, holes)) == 80000 - 5 and not any(token in hole for hole in holes for token in ids)


def test_unigram_vocabulary_whose_special_tokens_the_config_does_not_name(tmp_path):
    """The raw file finds them in text; here text is text."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), *((letter, -3.0) for letter in "<s>unka/ ")]
    raw = Tokenizer(models.Unigram(list(dict(pieces).items()), unk_id=0))
    raw.add_special_tokens(["<unk>", "<s>"])
    raw.save(str(tmp_path / "tokenizer.json"))
    found, = tokenize(load_tokenizer(tmp_path), ["a <s> <unk>"])
    assert raw.decode(found, skip_special_tokens=False).replace(" ", "") == "a<s><unk>" and min(found) > 1


def test_new_token_does_not_take_the_recorded_one(tokenizer):
    assert choose_mask_token("<new>", 512, 600, tokenizer) == (513, True)


@pytest.mark.parametrize("mask_token", ["", " ", "\n", "</s>", 1, 2, -1])
def test_token_that_cannot_mean_a_mask_is_refused(tokenizer, mask_token):
    with pytest.raises(CheckpointError):
        choose_mask_token(mask_token, None, 512, tokenizer)
    assert len(tokenizer) == 512


def test_missing_and_oversized_tokenizer(tokenizer):
    with pytest.raises(CheckpointError, match="mask"):
        choose_mask_token("<|mask|>", None, 512, None)
    with pytest.raises(CheckpointError, match="500"):
        choose_mask_token("<|mask|>", None, 500, tokenizer)
