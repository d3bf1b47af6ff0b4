"""Metrics and prompting against values computed by hand, and ROUGE against the reference package."""

import itertools
import json
import random

import numpy as np
import pytest

from dlm_jax.errors import ConfigError, DataError
from dlm_jax.evaluation.metrics import ANSWERS, METRICS, answer_after, few_shot, hit_at_k, majority, rouge_l, rouge_n


@pytest.mark.parametrize(("name", "text", "answers", "value"), [
    ("exact_match", "The Eiffel Tower!", ["eiffel tower"], 1),
    ("exact_match", "Eiffel", ["eiffel tower", "tower"], 0),
    ("contains", "It is the Onion, I think", ["leek", "an onion"], 1),
    ("contains", "It is", ["onion"], 0),
    ("contains", "It is", ["leek", "(a"], 0),  # as TriviaQA has it among the aliases of "static library"
    ("exact_match", "", ["leek", "(a"], 0),
    ("f1", "the quick brown fox", ["a brown dog", "no"], 2 * 1 / (3 + 2)),  # quick brown fox, brown dog
    ("f1", "x x y", ["x y y"], 2 * 2 / 6),
    ("f1", "nothing", ["else"], 0),
    ("first_word", " signs, and more", ["signs"], 1),
    ("first_word", "sign s", ["signs"], 0),
    ("first_word", "  ", ["signs"], 0),
    ("stripped_match", " signs ", ["signs"], 1),
    ("stripped_match", "signs.", ["signs"], 0),
    ("marked_number", "so 3*6\n#### $1,800.0", ["1800"], 1),
    ("marked_number", "so 18", ["18"], 0),
    ("marked_number", "#### many", ["18"], 0),
    ("last_number", "3 and then 1,800.", ["1800"], 1),
    ("last_number", "18 or -18", ["18"], 0),
    ("last_number", "", ["18"], 0),
    ("stated_number", "2 and 3. The answer is $1,800. Or 4", ["1800"], 1),
    ("stated_number", "So the answer is: 18", ["18"], 1),
    ("stated_number", "the answer is not known\n18", ["18"], 0),
    ("stated_number", "18", ["18"], 0),
    ("chosen_letter", " B", ["B"], 1),
    ("chosen_letter", "(B) 4", ["B"], 1),
    ("chosen_letter", "B. 4", ["B"], 1),
    ("chosen_letter", "A line has (B)", ["B"], 1),
    ("chosen_letter", "(A) or (C), the answer is (B).", ["B"], 1),
    ("chosen_letter", "Answer is B because", ["B"], 1),
    ("chosen_letter", "BE", ["B"], 0),
    ("chosen_letter", "b", ["B"], 0),
    ("marked_text", "a #### 1,800", ["1800"], 1),
    ("marked_text", "a #### 1800.0", ["1800"], 0),
    ("rouge1", "The cat sat.", ["the cat was here"], 2 * 2 / 7),
    ("rouge2", "The cat sat.", ["the cat was here"], 2 * 1 / 5),
    ("rougeL", "the dog and the cat", ["the cat and the dog"], 2 * 3 / 10),  # the, and, the
    ("rougeL", "...", ["the cat"], 0),
])
def test_by_hand(name, text, answers, value):
    assert METRICS[name](text, answers) == pytest.approx(value)


def test_rouge_is_that_of_the_reference_package():
    scorer = pytest.importorskip("rouge_score.rouge_scorer", reason="rouge-score is not installed")
    reference = scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=False)
    rng = random.Random(0)
    words = "the a cat Cat sat, on. mat-mat it's 3rd über & 's".split()
    for _ in range(300):
        text, gold = (" ".join(rng.choices(words, k=rng.randint(0, 12))) for _ in range(2))
        expected = reference.score(gold, text)
        found = rouge_n(text, gold, 1), rouge_n(text, gold, 2), rouge_l(text, gold)
        assert found == pytest.approx([expected[name].fmeasure for name in ("rouge1", "rouge2", "rougeL")])


@pytest.mark.parametrize(("name", "texts", "answer"), [
    ("exact_match", ["The Louvre.", "louvre"], "louvre"),
    ("exact_match", ["", "the", "?"], None),
    ("first_word", ["signs, more", " signs"], "signs"),
    ("first_word", [" "], None),
    ("marked_number", ["#### 1,800", "3\n#### $1800.0\nmore"], "1800.0"),
    ("marked_number", ["18", "#### many"], None),
    ("last_number", ["1 and -0", "0.0"], "0.0"),
    ("stated_number", ["The answer is 5.", "the answer is $5.00, not 6"], "5.0"),
    ("chosen_letter", ["(C)", "The answer is C."], "C"),
    ("chosen_letter", ["none"], None),
])
def test_texts_that_say_the_same_have_one_answer_and_one_value(name, texts, answer):
    assert {ANSWERS[name](text) for text in texts} == {answer}
    for gold in ("louvre", "signs", "1800", "0", "5", "C", ""):
        values = {METRICS[name](text, [gold]) for text in texts}
        assert len(values) == 1
        assert answer is not None or values == {0}


def test_examples_stand_before_the_question_and_the_prompt_ends_where_its_answer_begins():
    examples = [("1 + 1?", "2"), ("{answer} {question}?", "a {question}")]
    assert few_shot(examples, "3?") == (
        "Question: 1 + 1?\nAnswer: 2\n\nQuestion: {answer} {question}?\nAnswer: a {question}\n\nQuestion: 3?\nAnswer: ")
    assert few_shot([], "3?") == "Question: 3?\nAnswer: "
    assert few_shot([("a", "b")], "c", "{question}||{answer}.", "\n") == "a||b.\nc||"


@pytest.mark.parametrize("template", ["{question}", "{answer}", "{answer} {question}"])
def test_a_template_without_its_two_places_is_refused(template):
    with pytest.raises(ConfigError, match="{question}.*{answer}"):
        few_shot([], "?", template)


@pytest.mark.parametrize(("text", "answer"), [
    ("so\n#### 1,234,567\nQuestion: more\n#### 2", "1234567"), ("#### -3.5 ", "-3.5"), ("####72", "72"),
    ("#### a, b and 1,2", "a, b and 1,2"), ("no mark 5", None), ("#### \n5", None)])
def test_the_answer_is_the_rest_of_the_first_marked_line(text, answer):
    assert answer_after(text) == answer


def test_another_marker():
    assert answer_after("I think. The answer is 7", marker="The answer is") == "7"


def test_every_gold_answer_of_gsm8k_is_found(test_data):
    golds = [json.loads(line)["answer"] for line in (test_data / "gsm8k/test.jsonl").open(encoding="utf-8")]
    assert all(float(answer_after(gold)) == float(gold.split("####")[1].replace(",", "")) for gold in golds)


def test_the_vote_goes_to_the_most_frequent_and_of_equals_to_the_first():
    assert majority(["4", "5", "5", None, None, None]) == "5"
    assert majority(["4", "5", "5", "4"]) == "4"
    assert majority([None, None]) is None
    assert majority([]) is None


def test_hit_at_k_is_the_mean_over_all_choices_of_k_samples():
    rng = np.random.default_rng(0)
    rows = [list(rng.random(n) < 0.3) for n in (5, 7, 6)]
    for k in range(1, 6):
        expected = [np.mean([any(chosen) for chosen in itertools.combinations(row, k)]) for row in rows]
        assert hit_at_k(rows, k) == pytest.approx(np.mean(expected))
    assert hit_at_k([[True], [False]], 1) == 0.5


@pytest.mark.parametrize("k", [0, 3])
def test_more_samples_than_there_are_cannot_be_asked_for(k):
    with pytest.raises(ConfigError, match=f"k = {k}"):
        hit_at_k([[True] * 3, [False] * 2], k)
    with pytest.raises(DataError):
        hit_at_k([], 1)
