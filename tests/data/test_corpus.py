import copy
import dataclasses
import json
import os
import types

import fsspec
import numpy as np
import pytest
from transformers import AutoTokenizer

from dlm_jax.data import corpus
from dlm_jax.data.config import DataConfig, ExampleConfig
from dlm_jax.data.corpus import load_rows, open_raw_sources
from dlm_jax.data.prepare import prepare
from dlm_jax.data.records import is_held_out
from dlm_jax.errors import DataError


def write_corpus(path, count: int = 200, name: str = "story"):
    path.write_text("".join(json.dumps({"text": f"{name} number {i}."}) + "\n" for i in range(count)))
    return str(path)


def load(config, tokenizer, tmp_path, vocab_size: int = 300):
    return load_rows(config, tokenizer, vocab_size=vocab_size, cache_dir=tmp_path / "cache")


def load_one(config, tokenizer, tmp_path, vocab_size: int = 300):
    """Returns all rows of the only training source and of the validation split, in memory."""
    (train,), held_out = load(config, tokenizer, tmp_path, vocab_size)
    return train[slice(None)], None if held_out is None else held_out[slice(None)]


def prepared(directory, path: str, tokenizer, config: DataConfig) -> str:
    prepare(open_raw_sources(config, [path]), str(directory), tokenizer, config.rows_config())
    return str(directory)


def texts_of(rows, tokenizer) -> set[str]:
    return set(tokenizer.decode(rows.tokens.ravel()).split("</s>"))


def test_files_become_rows(tmp_path, tokenizer):
    train = write_corpus(tmp_path / "train.jsonl")
    validation = write_corpus(tmp_path / "val.jsonl", name="other")
    config = DataConfig(train=(train,), validation=(validation,), length=16)
    rows, held_out = load_one(config, tokenizer, tmp_path)
    stream = "".join(f"story number {i}.</s>" for i in range(200))
    ids = tokenizer.encode(stream)
    assert rows.tokens.ravel().tolist() == ids[: len(ids) // 16 * 16]
    assert rows.row_masks == ()
    assert tokenizer.decode(held_out.tokens[0]).startswith("other number 0.")


def test_held_out_documents_are_disjoint(tmp_path, tokenizer):
    train = write_corpus(tmp_path / "train.jsonl", 400)
    config = DataConfig(train=(train,), validation_fraction=0.25, length=4)
    documents = [{text for text in texts_of(rows, tokenizer) if text.endswith(".")}
                 for rows in load_one(config, tokenizer, tmp_path)]
    assert not documents[0] & documents[1]
    assert 0.15 < len(documents[1]) / 400 < 0.35
    assert all(is_held_out(text, 0.25) for text in documents[1])
    rows, nothing = load_one(DataConfig(train=(train,), validation_fraction=0.0, length=4), tokenizer, tmp_path)
    assert nothing is None
    assert len(texts_of(rows, tokenizer)) >= 400


def test_rows_are_cached_until_their_inputs_change(tmp_path, tokenizer, bos_tokenizer, monkeypatch):
    train = write_corpus(tmp_path / "train.jsonl")
    calls = []
    monkeypatch.setattr(corpus, "prepare", lambda *given: calls.append(1) or prepare(*given))

    def made(tokenizer=tokenizer, **changes) -> bool:
        calls.clear()
        config = DataConfig(**{"train": (train,), "validation_fraction": 0.0, "length": 16} | changes)
        load(config, tokenizer, tmp_path)
        return bool(calls)

    assert made()
    assert not made()
    assert not made(batch_size=3)
    assert made(length=8)
    assert made(packing="document_mask")
    assert made(add_bos=True)
    assert made(bos_tokenizer)
    os.utime(train, ns=(1, 1))
    assert made()
    assert not made()


def test_documents_start_with_bos_under_document_mask(tmp_path, tokenizer):
    train = write_corpus(tmp_path / "train.jsonl")
    config = DataConfig(train=(train,), packing="document_mask", validation_fraction=0.1, length=32)
    rows, _ = load_one(config, tokenizer, tmp_path)
    np.testing.assert_array_equal(rows.starts[:, 1:], rows.tokens[:, 1:] == tokenizer.bos_token_id)


def test_unusable_corpora_are_refused(tmp_path, tokenizer):
    train = write_corpus(tmp_path / "train.jsonl", 5)
    with pytest.raises(DataError, match=r"data\.train"):
        load(DataConfig(), tokenizer, tmp_path)
    with pytest.raises(DataError, match="100"):
        load(DataConfig(train=(train,)), tokenizer, tmp_path, vocab_size=100)
    with pytest.raises(DataError, match=r"train\.jsonl"):
        load(DataConfig(train=(train,), validation=(train,)), tokenizer, tmp_path)
    with pytest.raises(DataError, match=r"train\.jsonl.* 512"):
        load(DataConfig(train=(train,)), tokenizer, tmp_path)
    with pytest.raises(DataError, match=r"data\.validation_fraction"):
        load(DataConfig(train=(train,), length=8, validation_fraction=0.001), tokenizer, tmp_path)
    bare = copy.deepcopy(tokenizer)
    bare.eos_token = None
    with pytest.raises(DataError, match="EOS"):
        load(DataConfig(train=(train,), length=8), bare, tmp_path)


@pytest.mark.parametrize("validation_fraction", [0.0, 0.5])
def test_examples_that_are_all_too_long_are_not_called_too_short(tmp_path, tokenizer, validation_fraction):
    (tmp_path / "a.jsonl").write_text((json.dumps({"prompt": "x" * 50, "response": "y"}) + "\n") * 9)
    config = DataConfig(train=(str(tmp_path / "a.jsonl"),), length=32, validation_fraction=validation_fraction,
                        examples=ExampleConfig("prompt_response", overlong="drop"))
    with pytest.raises(DataError, match=r"9 examples.*data\.length.*overlong"):
        load(config, tokenizer, tmp_path)


def test_real_stories(tmp_path, test_data):
    tokenizer = AutoTokenizer.from_pretrained(test_data / "stories260K_hf")
    config = DataConfig(train=(str(test_data / "tinystories/*.json"),), length=128, validation_fraction=0.05)
    rows, held_out = load_one(config, tokenizer, tmp_path, vocab_size=512)
    stories = json.loads((test_data / "tinystories/stories_900.json").read_text(encoding="utf-8"))
    stories = [story for story in stories if not is_held_out(story, 0.05)]
    stream = [token for story in stories[:20] for token in [*tokenizer.encode(story), tokenizer.eos_token_id]]
    assert rows.tokens.ravel()[: len(stream)].tolist() == stream
    assert len(rows) > 1000
    assert 20 < len(held_out) < 200


def test_prepared_rows_equal_rows_made_on_the_fly(tmp_path, tokenizer):
    path = write_corpus(tmp_path / "train.jsonl")
    config = DataConfig(train=(path,), length=16, validation_fraction=0.2)
    directory = prepared(tmp_path / "rows", path, tokenizer, config)
    raw = load_one(config, tokenizer, tmp_path)
    for given in (directory, directory + "/"):
        made = load_one(dataclasses.replace(config, train=(given,)), tokenizer, tmp_path)
        for found, expected in zip(made, raw, strict=True):
            np.testing.assert_array_equal(found.tokens, expected.tokens)
    # As validation text, its validation split is used, or all of it where it has none.
    _, held_out = load_one(dataclasses.replace(config, validation=(directory,)), tokenizer, tmp_path)
    np.testing.assert_array_equal(held_out.tokens, raw[1].tokens)


def test_entries_are_concatenated_unless_weighted(tmp_path, tokenizer):
    paths = [write_corpus(tmp_path / f"{name}.jsonl", name=name) for name in ("ant", "bee", "cat")]
    config = DataConfig(train=tuple(paths), length=16, validation_fraction=0.0)
    directory = prepared(tmp_path / "rows", paths[0], tokenizer, config)
    config = dataclasses.replace(config, train=(directory, *paths[1:]))
    one, _ = load(config, tokenizer, tmp_path)
    weighted, _ = load(dataclasses.replace(config, weights=(2.0, 1.0, 1.0)), tokenizer, tmp_path)
    assert len(one) == 1
    assert len(weighted) == 3
    for name, source in zip(("ant", "bee", "cat"), weighted, strict=True):
        assert all(name in text for text in texts_of(source[slice(None)], tokenizer) if text.endswith("."))
    # Raw entries together are one stream, of which only one remainder is lost.
    assert len(one[0]) - sum(map(len, weighted)) in (0, 1)


def test_incompatible_prepared_rows_are_refused(tmp_path, tokenizer):
    path = write_corpus(tmp_path / "train.jsonl")
    config = DataConfig(train=(path,), length=16)
    config = dataclasses.replace(config, train=(prepared(tmp_path / "rows", path, tokenizer, config),))
    other = copy.deepcopy(tokenizer)
    other.eos_token = "<s>"
    with pytest.raises(DataError, match="tokenizer"):
        load(config, other, tmp_path)
    with pytest.raises(DataError, match=r"data\.length is 32.*--config\.data\.length=16"):
        load(dataclasses.replace(config, length=32), tokenizer, tmp_path)
    with pytest.raises(DataError, match=r"data\.packing is document_mask"):
        load(dataclasses.replace(config, packing="document_mask"), tokenizer, tmp_path)
    shard = next((tmp_path / "rows").glob("train*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"train-00000\.array_record"):
        load(config, tokenizer, tmp_path)
    (tmp_path / "rows" / "manifest.json").write_text("{}")
    with pytest.raises(DataError, match=r"manifest\.json"):
        load(config, tokenizer, tmp_path)
    (tmp_path / "rows" / "manifest.json").rename(tmp_path / "rows" / "progress.npz")
    with pytest.raises(DataError, match="dlm prepare"):
        load(config, tokenizer, tmp_path)


def test_prepared_examples_have_the_prompt_format_of_the_run(tmp_path, tokenizer):
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "response": "b"}\n' * 3)
    config = DataConfig(length=16, validation_fraction=0.0, examples=ExampleConfig(format="prompt_response"))
    rows = prepared(tmp_path / "rows", str(tmp_path / "pairs.jsonl"), tokenizer, config)
    other = dataclasses.replace(config, examples=ExampleConfig(format="prompt_response", separator="="))
    others = prepared(tmp_path / "others", str(tmp_path / "pairs.jsonl"), tokenizer, other)
    text = write_corpus(tmp_path / "text.jsonl")

    def total(config, *train):
        return sum(map(len, load(dataclasses.replace(config, train=train), tokenizer, tmp_path)[0]))

    plain = dataclasses.replace(config, examples=ExampleConfig())
    with pytest.raises(DataError, match=r"data\.examples\.format"):
        total(plain, rows)
    with pytest.raises(DataError, match=r"data\.examples\.separator"):
        total(other, rows)
    assert total(config, rows) == 3 and total(other, rows, others) == 6  # one of several has the run's format
    assert total(plain, rows, text) > 100  # the format says how raw text is read


def test_folder_of_text_is_not_prepared_rows(tmp_path, tokenizer):
    write_corpus(tmp_path / "train.jsonl")
    with pytest.raises(DataError, match="folder"):
        load(DataConfig(train=(str(tmp_path),)), tokenizer, tmp_path)


def test_lines_of_a_text_file_are_examples(tmp_path, tokenizer):
    path = tmp_path / "sums.txt"
    path.write_text("".join(f"{i}+{i}=||<<{i}+{i}={2 * i}>> #### {2 * i}\n" for i in range(30)))
    config = DataConfig(train=(str(path),), length=48, validation_fraction=0.0,
                        examples=ExampleConfig(format="gsm8k_symbolic", train_on_padding=False))
    rows, _ = load_one(config, tokenizer, tmp_path)
    assert len(rows) == 30
    assert tokenizer.decode(rows.tokens[3][rows.noisable_mask[3]]) == "<<3+3=6>> #### 6</s>"


def test_rows_on_an_object_store_are_copied_once(tmp_path, tokenizer, monkeypatch):
    path = write_corpus(tmp_path / "a.jsonl")
    config = DataConfig(train=(path,), length=16, validation_fraction=0.2)
    expected = load_one(config, tokenizer, tmp_path)
    prepared("memory://rows", path, tokenizer, config)
    remote, fetched = dataclasses.replace(config, train=("memory://rows/",)), []
    files = type(fsspec.filesystem("memory"))
    get_file = files.get_file
    monkeypatch.setattr(files, "get_file", lambda self, *arguments, **rest: (
        fetched.append(arguments[0]), get_file(self, *arguments, **rest)))

    def check():
        for found, rows in zip(load_one(remote, tokenizer, tmp_path), expected, strict=True):
            np.testing.assert_array_equal(found.tokens, rows.tokens)

    check()
    assert len(fetched) == 2  # the shards of both splits
    check()
    assert len(fetched) == 2
    copy, = (tmp_path / "cache").glob("*-copy")
    victim = min(copy.iterdir())
    victim.write_bytes(victim.read_bytes()[:-1])
    check()
    assert len(fetched) == 3 and fetched[2].endswith(victim.name)
    victim.unlink()
    monkeypatch.setattr("shutil.disk_usage", lambda folder: types.SimpleNamespace(free=10))
    with pytest.raises(DataError, match=r"memory://rows.*data\.cache_dir"):
        load(remote, tokenizer, tmp_path)
    monkeypatch.undo()
    fsspec.filesystem("memory").rm("/rows/" + victim.name)
    with pytest.raises(DataError, match="memory://rows"):
        load(remote, tokenizer, tmp_path)
    assert not list(copy.glob(".*"))
