import contextlib
import random

import pytest

from dlm_jax.data.records import BrokenSource
from dlm_jax.data.sources import open_sources, texts


@pytest.mark.parametrize("separator", ["a", "ab", "aab", "\n\n\n", "aa"])
@pytest.mark.parametrize("block", [1, 2, 3, 7, 1000])
def test_a_text_is_parted_as_str_split_does_whatever_the_blocks(separator, block):
    rng = random.Random(block)
    for _ in range(200):
        text = "".join(rng.choices(["a", "b", "\n", separator], k=rng.randrange(12)))
        parts = text.split(separator)
        blocks = [text[at:at + block] for at in range(0, len(text), block)]
        assert list(texts.split(blocks, separator)) == (parts if parts[-1] else parts[:-1])


def test_a_text_file_is_one_document_without_a_separator(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\n\r\ntwo".encode())
    (source,) = open_sources([f"{tmp_path}/a.txt"])
    assert list(source.records()) == ["one\n\ntwo"]
    assert list(source.records(1)) == []


def test_a_text_file_that_is_not_utf8_is_broken_where_it_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "_BLOCK", 4)
    (tmp_path / "a.txt").write_bytes(b"one|two|" + b"x" * 20_000 + b"|\xff|four")
    (source,) = open_sources([f"{tmp_path}/a.txt"], separator="|")
    found = []
    with pytest.raises(BrokenSource, match="a.txt: damaged after document 2 .*invalid start byte"):
        found.extend(source.records())


def test_a_line_that_is_not_utf8_is_only_itself_bad(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'"a"\n"\xff"\n"b"')
    assert list(open_sources([f"{tmp_path}/a.jsonl"])[0].records(1)) == [b'"\xff"\n', b'"b"']


@pytest.mark.parametrize(("content", "unit"), [(b" \n[1]", "item"), (b"\xef\xbb\xbf [", "item"), (b"", "line"),
                                               (b'{"a": []}', "line"), (b" " * 9, "line")])
def test_what_a_json_file_counts_is_seen_in_its_first_character(tmp_path, content, unit):
    (tmp_path / "a.json").write_bytes(content)
    (source,) = open_sources([f"{tmp_path}/a.json"])
    with contextlib.suppress(BrokenSource):
        list(source.records())
    assert source.unit == unit
