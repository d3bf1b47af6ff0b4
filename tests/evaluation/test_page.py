"""The page of results, from the records of scripted models."""

from html.parser import HTMLParser

import pytest

from dlm_jax.evaluation.eval_model import EvalModel
from dlm_jax.evaluation.items import Item
from dlm_jax.evaluation.report import chance_of, margin, page, summarize
from dlm_jax.evaluation.run import Job, run
from dlm_jax.evaluation.tasks import TASKS
from tests.evaluation.test_run import ITEMS, encode, scripted

EMPTY = ("meta", "link", "br", "path", "use", "rect")


class Elements(HTMLParser):
    """All tags with their attributes, and the text, of a page whose tags close in order."""

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


def test_a_page_needs_nothing_from_elsewhere_and_says_what_the_table_says():
    found = Elements(page(*evaluated("piqa", "lambada", "text")))
    assert found.tags.count("svg") == 3 and "script" not in found.tags
    assert not [value for name, value in found.attributes if name in ("src", "href") and not value.startswith("#")
                and name != "xmlns"]
    for text in ("a<b", "66.7 ± 33.3", "+33.3 [-100.0, +100.0]", "1.2", "seed"):
        assert text in found.texts, text
    assert any("<script>1</script>\nexpected: &amp;" in text for text in found.texts)
    assert {"right", "wrong"} <= set(found.texts)


def test_what_has_no_shares_has_no_picture_of_them():
    found = Elements(page(*evaluated("text")))
    assert "svg" not in found.tags and "bits per byte" in found.texts


def test_what_was_written_is_shown_whatever_the_task():
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
