"""The history of every snapshot, and the page and the picture that show it."""

import html.parser
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from dlm_jax.errors import ConfigError, DataError
from dlm_jax.sampling import GAP, Snapshot
from dlm_jax.sampling.text import TokenTexts
from dlm_jax.sampling.trace import COLUMNS, LINES, Trace, lay_out, page_content
from tests.sampling.tiny_models import byte_tokenizer

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
WORDS = [" the", " cat", "</script>", "<b>", " &amp;", " $x_1$", ".", "\n", '"', "\u2028"]


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer(WORDS)


def encoded(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def snapshots(tokenizer, rows, length, num_steps, seed=0):
    """Yields random snapshots of unordered rows, with remasking; everything is revealed at the end."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(length // 2, length + 1, rows)
    lengths[0] = length
    order = rng.permutation(rows)
    inside = np.arange(length) < lengths[:, None]
    gaps = inside & (np.arange(length) > 3)
    tokens = rng.choice(encoded(tokenizer, "".join(WORDS)), (rows, length))
    tokens[:, 0] = tokenizer.bos_token_id
    masked, confidence = gaps.copy(), np.zeros((rows, length), np.float32)
    yield Snapshot(0, order, lengths, np.where(masked, 999, tokens), masked, confidence)
    for step in range(1, num_steps + 1):
        changed = gaps & (rng.random(gaps.shape) < 0.3) | masked & (step == num_steps)
        masked = np.where(changed, (rng.random(gaps.shape) < 0.2) & (step < num_steps), masked)
        tokens = np.where(changed, rng.permuted(tokens, axis=1), tokens)
        tokens[:, 0] = tokenizer.bos_token_id
        confidence = np.where(changed, np.log(rng.uniform(1e-3, 1, gaps.shape)), confidence).astype(np.float32)
        yield Snapshot(step, order, lengths, np.where(masked, 999, tokens), masked, confidence)


def make_trace(tokenizer, rows=3, length=40, num_steps=9):
    trace = Trace()
    for snapshot in snapshots(tokenizer, rows, length, num_steps):
        trace(snapshot)
    return trace


def revealed(tokens, masked):
    """Returns the trace of one row, revealed in one step."""
    trace = Trace()
    for step, hidden in enumerate((masked, [False] * len(tokens))):
        trace(Snapshot(step, np.array([0]), np.array([len(tokens)]), np.array([tokens]), np.array([hidden]),
                       np.zeros((1, len(tokens)))))
    return trace


def payload(page):
    return json.loads(re.search(r'<script type="application/json" id="trace">(.*?)</script>', page, re.S)[1])


def test_history_has_every_snapshot(tokenizer):
    expected = list(snapshots(tokenizer, 3, 40, 9))
    histories = make_trace(tokenizer).histories
    assert len(histories) == 3
    for snapshot in expected:
        for i, row in enumerate(snapshot.rows):
            inside = slice(snapshot.lengths[i])
            masked = snapshot.masked[i, inside]
            tokens, log_prob = histories[row].at(snapshot.step)
            np.testing.assert_array_equal(tokens, np.where(masked, GAP, snapshot.tokens[i, inside]))
            np.testing.assert_array_equal(log_prob, np.where(masked, 0, snapshot.confidence[i, inside]))
    assert any(change.token == GAP for history in histories for change in history.changes)


def test_second_call_starts_again(tokenizer):
    trace = make_trace(tokenizer)
    for snapshot in snapshots(tokenizer, 3, 40, 2, seed=1):
        trace(snapshot)
    assert [history.num_steps for history in trace.histories] == [2, 2, 2]


def test_end_is_first_eos_without_given_text_after_it(tokenizer):
    end, token = tokenizer.eos_token_id, encoded(tokenizer, " cat")[0]

    def ends(masked, tokens):
        return revealed(tokens, masked).histories[0].end(end)

    assert ends([False, True, True, True, True], [end, token, end, token, end]) == 2
    assert ends([False, True, True, False, True], [end, token, end, token, end]) == 4
    assert ends([False, True, True, False, False], [end, token, end, token, token]) == 5


def test_page_is_complete_escaped_and_small(tokenizer, tmp_path):
    path = tmp_path / "trace.html"
    trace = make_trace(tokenizer, rows=4, length=256, num_steps=64)
    trace.save(path, tokenizer, caption="</script><script>alert(1)</script> & <b>")
    assert [file.name for file in tmp_path.iterdir()] == ["trace.html"]
    page = path.read_text()
    assert len(page) < 500_000
    assert not re.search(r"https?:|//[a-z]|src=|url\(|@import|@TRACE@", page.replace("http-equiv", ""))
    tags = []
    parser = html.parser.HTMLParser()
    parser.handle_starttag = lambda tag, attributes: tags.append(tag)
    parser.feed(page)
    assert tags.count("script") == 2 and "b" not in tags
    assert "default-src 'none'" in page
    content, texts = payload(page), TokenTexts(tokenizer)
    assert content["caption"] == "</script><script>alert(1)</script> & <b>"
    for history, sample in zip(trace.histories, content["samples"], strict=True):
        shown = list(sample["start"])
        for changes in sample["steps"]:
            for position, token in zip(changes[::3], changes[1::3], strict=True):
                shown[position] = token
        final, _ = history.at(history.num_steps)
        assert [content["texts"][token] for token in shown] == [texts.text(token) for token in final.tolist()]
        assert sample["first"] == 1


def test_token_texts(tokenizer):
    tokens = [*encoded(tokenizer, " cat.\n"), tokenizer.eos_token_id]
    assert [*map(TokenTexts(tokenizer).text, tokens)] == [" cat", ".", "\n", "<end>"]
    pieces = Tokenizer(models.WordLevel({"▁the": 0, "a": 1, "?": 2}, unk_token="?"))
    pieces.decoder = decoders.Metaspace()
    assert [*map(TokenTexts(PreTrainedTokenizerFast(tokenizer_object=pieces)).text, [0, 1])] == [" the", "a"]


def test_characters_of_several_tokens_are_joined(tokenizer):
    tokens = encoded(tokenizer, "né 🏠")
    broken = tokens[1]
    texts = TokenTexts(tokenizer)
    assert texts.joined(tokens) == [(1, 2, "é"), (4, 4, "🏠")]
    interrupted = [broken, *tokens[1:], GAP, *tokens[4:6]]
    assert texts.joined(interrupted) == [(1, 2, "é"), (4, 4, "🏠")]
    sample = page_content(revealed(tokens, [True] * len(tokens)).histories, tokenizer, "")["samples"][0]
    assert sample["joined"] == [(1, 2, "é"), (4, 4, "🏠")]


def test_picture_lines_break_between_words():
    rng = np.random.default_rng(0)
    texts = [" " * int(rng.integers(2)) + "w" * int(rng.integers(1, 12)) + "\n" * (rng.random() < 0.02)
             for _ in range(300)]
    widths = [len(text.strip()) for text in texts]
    places = lay_out(texts, widths)
    assert 0 < len(places) < len(texts) and places[-1][0] == LINES - 1
    ends = [(line, column + width) for (line, column), width in zip(places, widths, strict=False)]
    assert max(column for _, column in ends) <= COLUMNS
    for i in range(1, len(places)):
        spaced = texts[i].startswith(" ")
        if places[i][1] == 0:
            assert spaced or texts[i - 1].endswith("\n") or ends[i - 1][1] + widths[i] > COLUMNS
        else:
            assert places[i] == (ends[i - 1][0], ends[i - 1][1] + spaced)
    assert lay_out(["x" * 300, "y"], [300, 1]) == [(0, 0), (1, 0)]


@pytest.mark.parametrize("num_steps", [1, 64])
def test_picture_without_pyplot(tokenizer, tmp_path, num_steps):
    from matplotlib import pyplot as plt

    before = plt.get_fignums()
    trace = make_trace(tokenizer, rows=1, num_steps=num_steps)
    trace.save(tmp_path / "trace.PNG", tokenizer, caption="日本 $a_b$ " * 20)
    assert [file.name for file in tmp_path.iterdir()] == ["trace.PNG"]
    pixels = plt.imread(tmp_path / "trace.PNG", format="png")
    assert pixels.shape[1] > 1000 and len(np.unique(pixels[..., 2])) > 50
    assert plt.get_fignums() == before


def test_refused_paths_and_empty_trace(tokenizer, tmp_path):
    trace = make_trace(tokenizer)
    with pytest.raises(ConfigError, match=r"\.html or \.png"):
        trace.save(tmp_path / "trace.gif", tokenizer)
    with pytest.raises(ConfigError, match="no"):
        trace.save(tmp_path / "no" / "trace.png", tokenizer)
    with pytest.raises(DataError, match="on_step"):
        Trace().save(tmp_path / "trace.html", tokenizer)


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium to open the page in")
def test_browser_shows_step_of_address(tokenizer, tmp_path):
    trace = make_trace(tokenizer)
    path = tmp_path / "trace.html"
    trace.save(path, tokenizer, caption="<i>mine</i>")

    def look(address):
        done = subprocess.run([BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/p",
                               "--virtual-time-budget=2000", "--dump-dom", f"{path.as_uri()}#{address}"],
                              capture_output=True, text=True, check=True, timeout=120)
        return done.stdout

    for number, step in ((1, 0), (2, 4), (3, 9)):
        history, page = trace.histories[number - 1], look(f"sample={number}&step={step}&view=order")
        tokens, _ = history.at(step)
        gaps = history.start == GAP
        cells = re.findall(r'<span data-position="(\d+)" class="([\w ]+)"', page)
        assert [int(position) for position, _ in cells] == list(range(1, len(tokens)))
        for position, classes in cells:
            kind = "given" if not gaps[int(position)] else "masked" if tokens[int(position)] == GAP else "shown"
            assert kind in classes.split()
        assert f"step {step} of {history.num_steps}" in page and "&lt;i&gt;mine&lt;/i&gt;" in page
        shown = (gaps & (tokens != GAP)).sum()
        assert f"{shown} of {gaps.sum()} tokens revealed" in page
