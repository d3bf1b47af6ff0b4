"""Metrics against values computed by hand, and ROUGE against its reference package."""

import json
import math
import random
import re

import pytest

from dlm_jax.evaluation.metrics import (
    contains,
    distinct,
    first_sentence,
    rouge_l,
    rouge_n,
    strict_match,
    token_f1,
)


@pytest.mark.parametrize(("metric", "text", "answers", "value"), [
    (contains, "It is the Onion, I think", ["leek", "an onion"], 1),
    (contains, "It is", ["onion"], 0),
    (contains, "It is", ["leek", "(a"], 0),  # as TriviaQA has it among the aliases of "static library"
    (token_f1, "the quick brown fox", ["a brown dog", "no"], 2 * 1 / (3 + 2)),  # quick brown fox, brown dog
    (token_f1, "x x y", ["x y y"], 2 * 2 / 6),
    (token_f1, "nothing", ["else"], 0),
    (strict_match, "so 3*6\n#### $1,800.0", "1800", 1),
    (strict_match, "so 18", "18", 0),
    (strict_match, "#### many", "18", 0),
    (strict_match, "####\n18", "18", 0),
])
def test_metric_by_hand(metric, text, answers, value):
    assert metric(text, answers) == pytest.approx(value)


def test_rouge_by_hand():
    assert rouge_n("The cat sat.", "the cat was here", 1) == pytest.approx(2 * 2 / 7)
    assert rouge_n("The cat sat.", "the cat was here", 2) == pytest.approx(2 * 1 / 5)
    assert rouge_l("the dog and the cat", "the cat and the dog") == pytest.approx(2 * 3 / 10)  # the, and, the
    assert rouge_l("...", "the cat") == 0


def test_strict_match_as_the_papers_grader():
    rng = random.Random(0)
    numbers = ["18", "-5", "1,250", "1,250.50", "$18", "-$7", "0.5", "3.", "-0.25", "120,000"]
    before, after = ["so ", "\n", "", "is: ", "("], [" dollars", "%", ".", "\n", " (eighteen)", "", ","]
    for _ in range(500):
        text = " ".join(rng.choice(before) + rng.choice(["#### ", "#### Step ", "", "= "]) + rng.choice(numbers)
                        + rng.choice(after) for _ in range(rng.randint(1, 3)))
        found = re.search(r"#### (-?[0-9.,]+)", text.replace("$", ""))
        value = found[1].replace(",", "").rstrip(".") if found else "18"
        assert strict_match(text, str(float(value))) == float(found is not None)


def test_answers_of_gsm8k_match_themselves(test_data):
    golds = [json.loads(line)["answer"] for line in (test_data / "gsm8k/test.jsonl").open(encoding="utf-8")]
    assert all(strict_match(gold, gold.split("####")[1]) for gold in golds)


def test_rouge_against_its_reference():
    scorer = pytest.importorskip("rouge_score.rouge_scorer", reason="rouge-score is not installed")
    reference = scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=False)
    rng = random.Random(0)
    words = "the a cat Cat sat, on. mat-mat it's 3rd über & 's".split()
    for _ in range(300):
        text, gold = (" ".join(rng.choices(words, k=rng.randint(0, 12))) for _ in range(2))
        expected = reference.score(gold, text)
        found = rouge_n(text, gold, 1), rouge_n(text, gold, 2), rouge_l(text, gold)
        assert found == pytest.approx([expected[name].fmeasure for name in ("rouge1", "rouge2", "rougeL")])


def test_distinct_by_hand():
    texts = ["A cat a", "the cat"]
    assert distinct(texts, 1) == 3 / 5 and distinct(texts, 2) == 3 / 3 and distinct(texts, 3) == 1
    assert math.isnan(distinct(["a"], 2))


def test_first_sentence():
    assert first_sentence(' "He ran!" he said. She sat.') == '"He ran!"'
    assert first_sentence("no end") == "no end" and first_sentence("3.5 km. So") == "3.5 km."
