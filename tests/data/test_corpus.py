import copy
import json
import os

import numpy as np
import pytest
from transformers import AutoTokenizer

from dlm_jax.data import tokenize
from dlm_jax.data.config import DataConfig
from dlm_jax.data.corpus import is_held_out, load_rows
from dlm_jax.errors import DataError


def write_corpus(path, count: int = 200, name: str = "story"):
    path.write_text("".join(json.dumps({"text": f"{name} number {i}."}) + "\n" for i in range(count)))
    return str(path)


def load(config, tokenizer, tmp_path, vocab_size: int = 300):
    return load_rows(config, tokenizer, vocab_size=vocab_size, cache_dir=tmp_path / "cache")


def texts_of(rows, tokenizer) -> set[str]:
    return set(tokenizer.decode(rows.tokens.ravel()).split("</s>"))


def test_files_become_rows(tmp_path, tokenizer):
    train = write_corpus(tmp_path / "train.jsonl")
    validation = write_corpus(tmp_path / "val.jsonl", name="other")
    config = DataConfig(train=(train,), validation=(validation,), length=16)
    rows, held_out = load(config, tokenizer, tmp_path)
    stream = "".join(f"story number {i}.</s>" for i in range(200))
    ids = tokenizer.encode(stream)
    assert rows.tokens.ravel().tolist() == ids[: len(ids) // 16 * 16]
    assert rows.segment_ids is None
    assert tokenizer.decode(held_out.tokens[0]).startswith("other number 0.")


def test_held_out_documents_are_a_stable_disjoint_part(tmp_path, tokenizer):
    train = write_corpus(tmp_path / "train.jsonl", 400)
    config = DataConfig(train=(train,), validation_fraction=0.25, length=4)
    parts = [texts_of(rows, tokenizer) for rows in load(config, tokenizer, tmp_path)]
    whole = [{text for text in part if text.endswith(".")} for part in parts]
    assert not whole[0] & whole[1]
    assert 0.15 < len(whole[1]) / 400 < 0.35
    assert all(is_held_out(text, 0.25) for text in whole[1])
    rows, nothing = load(DataConfig(train=(train,), validation_fraction=0.0, length=4), tokenizer, tmp_path)
    assert nothing is None
    assert len(texts_of(rows, tokenizer)) >= 400


def test_rows_are_cached_until_something_that_matters_changes(tmp_path, tokenizer, bos_tokenizer, monkeypatch):
    train = write_corpus(tmp_path / "train.jsonl")
    calls = []
    encode = tokenize.encode
    monkeypatch.setattr(tokenize, "encode", lambda *given: calls.append(1) or encode(*given))

    def made(tokenizer=tokenizer, **changes) -> bool:
        calls.clear()
        load(
            DataConfig(**{"train": (train,), "validation_fraction": 0.0, "length": 16} | changes),
            tokenizer,
            tmp_path,
        )
        return bool(calls)

    assert made()
    assert not made()
    assert not made(batch_size=3)
    assert made(length=8)
    assert made(pack="segments")
    assert made(add_bos=True)
    assert made(bos_tokenizer)
    os.utime(train, ns=(1, 1))
    assert made()
    assert not made()


def test_segments_begin_with_bos(tmp_path, tokenizer):
    train = write_corpus(tmp_path / "train.jsonl")
    rows, _ = load(DataConfig(train=(train,), pack="segments", validation_fraction=0.1, length=32), tokenizer, tmp_path)
    starts = np.diff(rows.segment_ids, axis=1) != 0
    np.testing.assert_array_equal(starts, rows.tokens[:, 1:] == tokenizer.bos_token_id)


def test_errors_say_what_to_do(tmp_path, tokenizer):
    train = write_corpus(tmp_path / "train.jsonl", 5)
    with pytest.raises(DataError, match="names no file"):
        load(DataConfig(), tokenizer, tmp_path)
    with pytest.raises(DataError, match="vocabulary only 100"):
        load(DataConfig(train=(train,)), tokenizer, tmp_path, vocab_size=100)
    with pytest.raises(DataError, match=r"train\.jsonl is both training and validation"):
        load(DataConfig(train=(train,), validation=(train,)), tokenizer, tmp_path)
    with pytest.raises(DataError, match="train text is too short for one row of 512"):
        load(DataConfig(train=(train,)), tokenizer, tmp_path)
    with pytest.raises(DataError, match=r"held-out text is too short .* data.validation_fraction"):
        load(DataConfig(train=(train,), length=8, validation_fraction=0.001), tokenizer, tmp_path)
    bare = copy.deepcopy(tokenizer)
    bare.eos_token = None
    with pytest.raises(DataError, match="no EOS"):
        load(DataConfig(train=(train,), length=8), bare, tmp_path)


def test_real_text_survives_the_road(tmp_path, test_data):
    tokenizer = AutoTokenizer.from_pretrained(test_data / "stories260K_hf")
    config = DataConfig(train=(str(test_data / "tinystories/*.json"),), length=128, validation_fraction=0.05)
    rows, held_out = load(config, tokenizer, tmp_path, vocab_size=512)
    stories = json.loads((test_data / "tinystories/stories_900.json").read_text(encoding="utf-8"))
    stories = [story for story in stories if not is_held_out(story, 0.05)]
    stream = [token for story in stories[:20] for token in [*tokenizer.encode(story), tokenizer.eos_token_id]]
    assert rows.tokens.ravel()[: len(stream)].tolist() == stream
    assert len(rows) > 1000
    assert 20 < len(held_out) < 200
