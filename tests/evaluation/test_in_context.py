import itertools
import json

import numpy as np
import pytest

from dlm_jax.errors import ConfigError, DataError
from dlm_jax.evaluation.metrics import answer_after, few_shot, hit_at_k, majority


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
