"""Free writing: openings, distinct-n, and what a judge makes of scripted texts."""

import math

import pytest

from dlm_jax.data.records import BadRecord
from dlm_jax.errors import ConfigError, DataError
from dlm_jax.evaluation.eval_model import EvalModel
from dlm_jax.evaluation.generation import distinct, diversity, opening
from dlm_jax.evaluation.items import Item
from dlm_jax.evaluation.report import summarize, table
from dlm_jax.evaluation.run import Job, run
from dlm_jax.evaluation.tasks import TASKS
from tests.evaluation.test_run import encode, scripted

JUDGE = scripted("judge", lambda text: 0.5 * len(text.split()) + text.count("odd"))


def test_an_opening_is_a_prompt_or_a_texts_first_sentence():
    assert opening({"prompt": ""}, False) == Item()
    assert opening({"text": "A cat sat. A dog ran."}, False) == Item(prompt="A cat sat.")
    with pytest.raises(BadRecord, match="prompt"):
        opening({"prompt": 3}, False)


def test_distinct_by_hand():
    texts = ["a b a", "A c"]
    assert distinct(texts, 1) == 3 / 5 and distinct(texts, 2) == 3 / 3 and distinct(texts, 3) == 1
    assert diversity(["a", "a"]) == {"distinct_1": 0.5} and diversity([""]) == {}
    with pytest.raises(DataError, match="2"):
        distinct(["a"], 2)


def writer(*texts):
    given = iter(texts)

    def generate(requests, *, temperature, num_steps):
        assert temperature == 1.0 and all(len(request.lengths) == 1 for request in requests)
        return [next(given) for _ in requests]

    return EvalModel("writer", encode, generate=generate)


def test_perplexity_under_the_judge_by_hand():
    job = Job(TASKS["generation"], [Item(prompt="one"), Item(prompt="two"), Item(prompt="three")])
    records = run([job], [writer(" a b", "", " odd b c")], judge=JUDGE)
    assert [record["values"] for record in records] == [
        {"judged_nats": 1.0, "judged_tokens": 2, "words": 2}, {"judged_nats": 0, "judged_tokens": 0, "words": 0},
        {"judged_nats": 2.5, "judged_tokens": 3, "words": 3}]
    found = summarize(records, ["generation"], ["writer"])["generation"]["models"]["writer"]
    assert found["generative_perplexity"]["mean"] == pytest.approx(math.exp(3.5 / 5))
    residuals = [1 - 0.7 * 2, 0, 2.5 - 0.7 * 3]
    error = (sum(r * r for r in residuals) - sum(residuals) ** 2 / 3) ** 0.5 / 2**0.5 / 3**0.5 / (5 / 3)
    assert found["generative_perplexity"]["standard_error"] == pytest.approx(math.exp(0.7) * error)
    assert found["distinct_1"]["mean"] == pytest.approx(4 / 5) and found["words"]["mean"] == pytest.approx(5 / 3)
    shown = table(summarize(records, ["generation"], ["writer"]), ["writer"])
    assert "generative perplexity  3      2.014" in shown and "distinct 1             3      80.0\n" in shown


def test_several_samples_are_judged_together_and_a_judge_there_must_be():
    job = Job(TASKS["generation"], [Item(prompt="one")])
    record, = run([job], [writer(" a b", " c")], judge=JUDGE, samples=2)
    assert record["texts"] == [" a b", " c"]
    assert record["values"] == {"judged_nats": 1.5, "judged_tokens": 3, "words": 1.5}
    with pytest.raises(ConfigError, match="generation"):
        run([job], [writer(" a")])
    with pytest.raises(ConfigError, match="generation"):
        run([job], [writer(" a")], judge=JUDGE, reference=True)


def test_reconstruction_runs_as_a_task():
    def masked_accuracy(pairs, asked):
        return [masked.mean() for masked in asked]

    job = Job(TASKS["reconstruction"], [Item(options=(("", "one two three four five six seven eight nine ten"),))])
    record, = run([job], [EvalModel("guesser", encode, masked_accuracy=masked_accuracy)])
    assert record["values"] == pytest.approx({"10% masked": 0.1, "30% masked": 0.3, "50% masked": 0.5,
                                              "70% masked": 0.7, "90% masked": 0.9})
    with pytest.raises(ConfigError, match="silent.*reconstruction"):
        run([job], [EvalModel("silent", encode)])
