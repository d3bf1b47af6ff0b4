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
    """All rows of the only training source and of the held-out part, in memory."""
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


def test_held_out_documents_are_a_stable_disjoint_part(tmp_path, tokenizer):
    train = write_corpus(tmp_path / "train.jsonl", 400)
    config = DataConfig(train=(train,), validation_fraction=0.25, length=4)
    parts = [texts_of(rows, tokenizer) for rows in load_one(config, tokenizer, tmp_path)]
    whole = [{text for text in part if text.endswith(".")} for part in parts]
    assert not whole[0] & whole[1]
    assert 0.15 < len(whole[1]) / 400 < 0.35
    assert all(is_held_out(text, 0.25) for text in whole[1])
    rows, nothing = load_one(DataConfig(train=(train,), validation_fraction=0.0, length=4), tokenizer, tmp_path)
    assert nothing is None
    assert len(texts_of(rows, tokenizer)) >= 400


def test_rows_are_cached_until_something_that_matters_changes(tmp_path, tokenizer, bos_tokenizer, monkeypatch):
    train = write_corpus(tmp_path / "train.jsonl")
    calls = []
    monkeypatch.setattr(corpus, "prepare", lambda *given: calls.append(1) or prepare(*given))

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
    assert made(packing="document_mask")
    assert made(add_bos=True)
    assert made(bos_tokenizer)
    os.utime(train, ns=(1, 1))
    assert made()
    assert not made()


def test_segments_begin_with_bos(tmp_path, tokenizer):
    train = write_corpus(tmp_path / "train.jsonl")
    config = DataConfig(train=(train,), packing="document_mask", validation_fraction=0.1, length=32)
    rows, _ = load_one(config, tokenizer, tmp_path)
    np.testing.assert_array_equal(rows.starts[:, 1:], rows.tokens[:, 1:] == tokenizer.bos_token_id)


def test_errors_say_what_to_do(tmp_path, tokenizer):
    train = write_corpus(tmp_path / "train.jsonl", 5)
    with pytest.raises(DataError, match="names no text"):
        load(DataConfig(), tokenizer, tmp_path)
    with pytest.raises(DataError, match="vocabulary only 100"):
        load(DataConfig(train=(train,)), tokenizer, tmp_path, vocab_size=100)
    with pytest.raises(DataError, match=r"train\.jsonl is both training and validation"):
        load(DataConfig(train=(train,), validation=(train,)), tokenizer, tmp_path)
    with pytest.raises(DataError, match=r"train.jsonl is too short for one row of 512"):
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
    rows, held_out = load_one(config, tokenizer, tmp_path, vocab_size=512)
    stories = json.loads((test_data / "tinystories/stories_900.json").read_text(encoding="utf-8"))
    stories = [story for story in stories if not is_held_out(story, 0.05)]
    stream = [token for story in stories[:20] for token in [*tokenizer.encode(story), tokenizer.eos_token_id]]
    assert rows.tokens.ravel()[: len(stream)].tolist() == stream
    assert len(rows) > 1000
    assert 20 < len(held_out) < 200


def test_prepared_rows_are_the_rows_made_on_the_fly(tmp_path, tokenizer):
    path = write_corpus(tmp_path / "train.jsonl")
    config = DataConfig(train=(path,), length=16, validation_fraction=0.2)
    directory = prepared(tmp_path / "rows", path, tokenizer, config)
    raw = load_one(config, tokenizer, tmp_path)
    for given in (directory, directory + "/"):
        made = load_one(dataclasses.replace(config, train=(given,)), tokenizer, tmp_path)
        for part in range(2):
            np.testing.assert_array_equal(made[part].tokens, raw[part].tokens)
    # As validation text, its held-out part counts, or all of it where it has none.
    _, held_out = load_one(dataclasses.replace(config, validation=(directory,)), tokenizer, tmp_path)
    np.testing.assert_array_equal(held_out.tokens, raw[1].tokens)


def test_entries_join_or_with_weights_stay_apart(tmp_path, tokenizer):
    paths = [write_corpus(tmp_path / f"{name}.jsonl", name=name) for name in ("ant", "bee", "cat")]
    config = DataConfig(train=tuple(paths), length=16, validation_fraction=0.0)
    directory = prepared(tmp_path / "rows", paths[0], tokenizer, config)
    config = dataclasses.replace(config, train=(directory, *paths[1:]))
    joined, _ = load(config, tokenizer, tmp_path)
    apart, _ = load(dataclasses.replace(config, weights=(2.0, 1.0, 1.0)), tokenizer, tmp_path)
    assert len(joined) == 1
    assert len(apart) == 3
    for name, source in zip(("ant", "bee", "cat"), apart, strict=True):
        assert all(name in text for text in texts_of(source[slice(None)], tokenizer) if text.endswith("."))
    # Raw entries together are one stream, so that only its end is lost.
    assert len(joined[0]) - sum(map(len, apart)) in (0, 1)


def test_prepared_rows_that_do_not_fit_are_refused(tmp_path, tokenizer, bos_tokenizer):
    path = write_corpus(tmp_path / "train.jsonl")
    config = DataConfig(train=(path,), length=16)
    config = dataclasses.replace(config, train=(prepared(tmp_path / "rows", path, tokenizer, config),))
    with pytest.raises(DataError, match=r"rows were made with another tokenizer|made with another tokenizer"):
        load(config, copy_with_another_eos(tokenizer), tmp_path)
    with pytest.raises(DataError, match=r"prepared with length=16, but data.length is 32.*--config.data.length=16"):
        load(dataclasses.replace(config, length=32), tokenizer, tmp_path)
    with pytest.raises(DataError, match=r"prepared with packing=concat, but data.packing is document_mask"):
        load(dataclasses.replace(config, packing="document_mask"), tokenizer, tmp_path)
    shard = next((tmp_path / "rows").glob("train*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"train-00000.array_record has [\d,]+ bytes, not"):
        load(config, tokenizer, tmp_path)
    (tmp_path / "rows" / "manifest.json").write_text("{}")
    with pytest.raises(DataError, match=r"manifest.json is not a manifest"):
        load(config, tokenizer, tmp_path)
    (tmp_path / "rows" / "manifest.json").rename(tmp_path / "rows" / "progress.npz")
    with pytest.raises(DataError, match=r"not finished; run its `dlm prepare` command again"):
        load(config, tokenizer, tmp_path)


def test_prepared_examples_are_what_the_run_will_have_on_record(tmp_path, tokenizer):
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "response": "b"}\n' * 3)
    config = DataConfig(length=16, validation_fraction=0.0, examples=ExampleConfig(format="prompt_response"))
    rows = prepared(tmp_path / "rows", str(tmp_path / "pairs.jsonl"), tokenizer, config)
    other = dataclasses.replace(config, examples=ExampleConfig(format="prompt_response", separator="="))
    others = prepared(tmp_path / "others", str(tmp_path / "pairs.jsonl"), tokenizer, other)
    text = write_corpus(tmp_path / "text.jsonl")

    def total(config, *train):
        return sum(map(len, load(dataclasses.replace(config, train=train), tokenizer, tmp_path)[0]))

    plain = dataclasses.replace(config, examples=ExampleConfig())
    with pytest.raises(DataError, match=r"prepared with examples.format='prompt_response', but data.examples.format is "
                                        r"'none'; set it as it was"):
        total(plain, rows)
    with pytest.raises(DataError, match=r"examples.separator='\\n', but data.examples.separator is '='"):
        total(other, rows)
    assert total(config, rows) == 3 and total(other, rows, others) == 6  # one of several is what is asked later
    assert total(plain, rows, text) > 100  # here the setting is how the raw text is read


def copy_with_another_eos(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.eos_token = "<s>"
    return other


def test_a_folder_of_text_is_not_taken_for_prepared_rows(tmp_path, tokenizer):
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
    assert len(fetched) == 2  # of the training and of the held-out rows
    check()
    assert len(fetched) == 2
    copy, = (tmp_path / "cache").glob("*-copy")
    victim = min(copy.iterdir())
    victim.write_bytes(victim.read_bytes()[:-1])
    check()
    assert len(fetched) == 3 and fetched[2].endswith(victim.name)
    victim.unlink()
    monkeypatch.setattr("shutil.disk_usage", lambda folder: types.SimpleNamespace(free=10))
    with pytest.raises(DataError, match=r"memory://rows/ has .* GiB to copy, .* data.cache_dir, or mount the bucket"):
        load(remote, tokenizer, tmp_path)
    monkeypatch.undo()
    fsspec.filesystem("memory").rm("/rows/" + victim.name)
    with pytest.raises(DataError, match=r"memory://rows/ cannot be copied to .*-copy"):
        load(remote, tokenizer, tmp_path)
    assert not list(copy.glob(".*"))
