import json
import shutil

import pytest
import sentencepiece

from dlm_jax.checkpoints.tokenizer import choose_mask_token, load_tokenizer
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


def test_missing_and_oversized_tokenizer(tokenizer):
    with pytest.raises(CheckpointError, match="mask"):
        choose_mask_token("<|mask|>", None, 512, None)
    with pytest.raises(CheckpointError, match="500"):
        choose_mask_token("<|mask|>", None, 500, tokenizer)
