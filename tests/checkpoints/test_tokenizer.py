import json
import shutil

import pytest
import sentencepiece

from dlm_jax.checkpoints.tokenizer import choose_mask_token, load_tokenizer
from dlm_jax.errors import CheckpointError

TEXT = "Once upon a time, there was a\nlittle girl."


def test_a_bare_sentencepiece_model(tmp_path, test_data):
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
def test_code_beside_a_tokenizer_is_neither_run_nor_asked_about(where, tmp_path, test_data, monkeypatch, capfd):
    """As with the block diffusion models of other projects, whose tokenizer is one that transformers has."""
    shutil.copy(test_data / "gpt2_bpe" / "encoder.json", tmp_path / "vocab.json")
    shutil.copy(test_data / "gpt2_bpe" / "vocab.bpe", tmp_path / "merges.txt")
    settings = {"config.json": {"model_type": "Fast_dLLM_Qwen", "rope_scaling": None},
                "tokenizer_config.json": {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|endoftext|>"}}
    settings[where]["auto_map"] = {"config.json": {"AutoConfig": "theirs.Config"},
                                   "tokenizer_config.json": {"AutoTokenizer": ["theirs.Tokenizer", None]}}[where]
    for file, values in settings.items():
        (tmp_path / file).write_text(json.dumps(values))
    (tmp_path / "theirs.py").write_text("raise SystemExit('run')")
    monkeypatch.setattr("builtins.input", lambda _: pytest.fail("asked"))
    tokenizer = load_tokenizer(tmp_path)
    assert type(tokenizer).__name__.startswith("Qwen2Tokenizer")
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert capfd.readouterr().err == ""


def test_none_and_damaged(tmp_path):
    assert load_tokenizer(tmp_path) is None
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="tokenizer in .* cannot be read"):
        load_tokenizer(tmp_path)


@pytest.fixture
def tokenizer(test_data):
    return load_tokenizer(test_data / "stories260K_hf")


def test_an_existing_token_by_id_or_name(tokenizer):
    assert choose_mask_token(409, None, 512, tokenizer) == (409, False)
    assert choose_mask_token(tokenizer.convert_ids_to_tokens(409), None, 512, tokenizer) == (409, False)
    assert tokenizer.mask_token_id is None


def test_a_new_token_is_added(tokenizer):
    assert choose_mask_token("<|mask|>", None, 512, tokenizer) == (512, True)
    assert tokenizer.decode([403, 512, 407], skip_special_tokens=True).split() == ["Once", "upon"]
    assert choose_mask_token(None, None, 513, tokenizer) == (512, False)


def test_what_the_config_records_counts_before_the_tokenizer(tokenizer):
    tokenizer.add_special_tokens({"mask_token": "<|mask|>"})
    assert choose_mask_token(None, 3, 513, tokenizer) == (3, False)
    assert choose_mask_token(4, 3, 513, tokenizer) == (4, False)
    assert choose_mask_token(None, None, 513, None) == (None, False)


def test_a_name_without_a_tokenizer_and_a_tokenizer_too_large(tokenizer):
    with pytest.raises(CheckpointError, match="no tokenizer"):
        choose_mask_token("<|mask|>", None, 512, None)
    with pytest.raises(CheckpointError, match="do not belong together"):
        choose_mask_token("<|mask|>", None, 500, tokenizer)
