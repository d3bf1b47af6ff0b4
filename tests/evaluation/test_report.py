"""Statistics of results, and the HTML page of scripted models."""

from html.parser import HTMLParser

import numpy as np
import pytest

from dlm_jax.errors import DataError
from dlm_jax.evaluation.eval_model import EvalModel
from dlm_jax.evaluation.items import Item
from dlm_jax.evaluation.report import chance_of, margin, mean_of, page, paired_difference, ratio_of, summarize
from dlm_jax.evaluation.run import Job, run
from dlm_jax.evaluation.tasks import TASKS
from tests.evaluation.test_run import ITEMS, encode, scripted


def test_mean_of():
    found = mean_of([1, 0, 0, 1, 1])
    assert found.mean == 0.6 and found.count == 5
    assert found.standard_error == pytest.approx((0.6 * 0.4 / 4) ** 0.5)
    assert mean_of([1.0]).standard_error is None
    with pytest.raises(DataError):
        mean_of([])


def test_ratio_of_against_repetition():
    rng = np.random.default_rng(0)
    sizes = rng.integers(5, 50, (2000, 200))
    nats = sizes * rng.gamma(9.0, 1 / 3, sizes.shape)
    found = [ratio_of(*row) for row in zip(nats, sizes, strict=True)]
    assert found[0].mean == pytest.approx(nats[0].sum() / sizes[0].sum())
    assert np.mean([f.standard_error for f in found]) == pytest.approx(np.std([f.mean for f in found]), rel=0.1)


def test_paired_difference_covers_and_is_narrower():
    rng = np.random.default_rng(1)
    hard = rng.random((200, 300))  # items are hard for both models alike
    first, second = (rng.random(hard.shape) / 4 + hard < 0.8 for _ in range(2))
    found = [paired_difference(a, b) for a, b in zip(first[:20], second[:20], strict=True)]
    assert np.mean([f.low <= 0 <= f.high for f in found]) >= 0.8
    apart = (mean_of(first[0]).standard_error ** 2 + mean_of(second[0]).standard_error ** 2) ** 0.5
    assert found[0].standard_error < 0.8 * apart
    assert found[0].high - found[0].low == pytest.approx(2 * 1.96 * found[0].standard_error, rel=0.15)
    with pytest.raises(DataError, match="3 and 2"):
        paired_difference([1, 2, 3], [1, 2])


EMPTY = ("meta", "link", "br", "path", "use", "rect")


class Elements(HTMLParser):
    """Collects the tags, attributes and texts of a page, and checks that its tags close in order."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.attributes, self.texts = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        if tag not in EMPTY:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data.strip())


def evaluated(*names: str):
    models = [scripted("a<b", len), scripted("even", lambda text: len(text) ** 0.5)]
    writer = [EvalModel(model.name, encode, model.score, lambda requests, **_: ["<script>1</script>"] * len(requests))
              for model in models]
    jobs = [Job(TASKS["piqa"], ITEMS), Job(TASKS["lambada"], [Item(prompt="one", answers=("&amp;",))]),
            Job(TASKS["text"], [Item(options=(("", "some words"),))])]
    jobs = [job for job in jobs if job.task.name in names]
    records = run(jobs, writer)
    models = [model.name for model in writer]
    return {"models": models, "settings": {"seed": 3}, "versions": {"jax": "1.2"},
            "tasks": summarize(records, names, models)}, records


def test_page_is_self_contained():
    found = Elements(page(*evaluated("piqa", "lambada", "text")))
    assert found.tags.count("svg") == 3 and "script" not in found.tags
    assert not [value for name, value in found.attributes if name in ("src", "href") and not value.startswith("#")
                and name != "xmlns"]
    for text in ("a<b", "66.7 ± 33.3", "+33.3 [-100.0, +100.0]", "1.2", "seed"):
        assert text in found.texts, text
    assert any("<script>1</script>\nexpected: &amp;" in text for text in found.texts)
    assert {"right", "wrong"} <= set(found.texts)


def test_page_without_shares_has_no_figure():
    found = Elements(page(*evaluated("text")))
    assert "svg" not in found.tags and "bits per byte" in found.texts


def test_page_shows_generated_texts():
    records = [
        {"task": "humaneval_infilling", "model": "m", "item": 0, "text": "  x = 1", "prediction": "  x = 1",
         "outcomes": ["passed"], "values": {"pass_at_1": 1.0}},
        {"task": "mawps", "model": "m", "item": 0, "texts": ["a 1", "b 2"], "predictions": ["a 1", "b 2"],
         "answers": ["2"], "votes": ["1", "2"], "values": {"last_number": 0.5}},
        {"task": "generation", "model": "m", "item": 0, "text": "<free>",
         "values": {"judged_nats": 2.0, "judged_tokens": 4, "words": 1.0}}]
    names = ["humaneval_infilling", "mawps", "generation"]
    found = Elements(page({"models": ["m"], "settings": {}, "versions": {}, "tasks": summarize(records, names, ["m"])},
                          records))
    shown = "\n".join(found.texts)
    assert "x = 1\noutcome: passed" in shown and "a 1\nb 2\nexpected: 2" in shown and "<free>\n" in shown


def test_chance_and_margins_by_hand():
    _, records = evaluated("piqa")
    assert chance_of(records) == {"piqa": 0.5}
    assert [margin(record) for record in records[:3]] == [7 - 3, 2 - 3, 3 - 2]
    assert margin({"scores": [2.0, 1.0, 5.0], "gold": 2}) == pytest.approx(-4.0)
