"""Metrics against values computed by hand, and ROUGE against its reference package."""

import json
import random
import re

import pytest

from dlm_jax.evaluation.metrics import ANSWERS, METRICS, answer_after, majority, rouge_l, rouge_n


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
    ("strict_match", "so 3*6\n#### $1,800.0", ["1800"], 1),
    ("strict_match", "so 18", ["18"], 0),
    ("strict_match", "#### many", ["18"], 0),
    ("strict_match", "####\n18", ["18"], 0),
    ("last_number", "so -$5", ["-5"], 1),
    ("last_number", "or .5", ["0.5"], 1),
    ("stated_number", "the answer is -$1,250.50", ["-1250.5"], 1),
    ("stated_number", "the answer is .5.", ["0.5"], 1),
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
    ("reference_match", "a #### 1,800", ["1800"], 1),
    ("reference_match", "a #### 1800.0", ["1800"], 0),
    ("rouge1", "The cat sat.", ["the cat was here"], 2 * 2 / 7),
    ("rouge2", "The cat sat.", ["the cat was here"], 2 * 1 / 5),
    ("rougeL", "the dog and the cat", ["the cat and the dog"], 2 * 3 / 10),  # the, and, the
    ("rougeL", "...", ["the cat"], 0),
])
def test_metric_by_hand(name, text, answers, value):
    assert METRICS[name](text, answers) == pytest.approx(value)


def test_numbers_as_the_fields_graders_find_them():
    """The paper's grader of GSM8K, and the filters of lm-eval's task gsm8k, on texts that hold a number."""
    rng = random.Random(0)
    numbers = ["18", "-5", "1,250", "1,250.50", "$18", "-$7", "0.5", "3.", "-0.25", "120,000"]
    before, after = ["so ", "\n", "", "is: ", "("], [" dollars", "%", ".", "\n", " (eighteen)", "", ","]
    for _ in range(500):
        text = " ".join(rng.choice(before) + rng.choice(["#### ", "#### Step ", "", "= "]) + rng.choice(numbers)
                        + rng.choice(after) for _ in range(rng.randint(1, 3)))
        if found := re.search(r"#### (-?[0-9.,]+)", text.replace("$", "")):
            value = float(found[1].replace(",", "").rstrip("."))
            assert METRICS["strict_match"](text, [str(value)]) == 1
        else:
            assert ANSWERS["strict_match"](text) is None
        one, other = re.findall(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", text)[-1]
        value = (one or other).replace(",", "").replace("$", "").rstrip(".")
        if any(digit.isdigit() for digit in value):  # lm-eval takes "., " and the like as a number too
            assert METRICS["last_number"](text, [value]) == 1


@pytest.mark.parametrize("decorated", [
    "{}", "({})", "**{}**", "**({})**", "${}$", r"\boxed{{{}}}", r"$\boxed{{{}}}$", r"\(\boxed{{\text{{{}}}}}\)",
    r"\textbf{{({})}}", "`{}`", "[{}]", '"{}"'])
@pytest.mark.parametrize("letter", ["A", "B", "I"])
def test_decorated_letters_are_chosen(decorated, letter):
    shown = decorated.format(letter)
    for text in ("{}", "{}.", "The answer is {}", "The answer is: {}.", "So the answer is {} because 1 < 2",
                 "Answer: {}", "**Answer: {}**", "**Answer:** {}\n", "The correct answer is {}, not (C).", " {}\nmore"):
        assert METRICS["chosen_letter"](text.format(shown), [letter]) == 1, text.format(shown)
    assert METRICS["chosen_letter"](f"Half of (C) is 4, so \\boxed{{{letter}}} fits.", [letter]) == 1


@pytest.mark.parametrize("text", [
    "The answer is A triangle", "A train leaves at noon.", "I think so", "The answer is I don't know",
    "The answer is Bob", "The answer is B2", "Answer: A dog", "BE", "**Ask**", "The answer is a"])
def test_words_are_no_letters(text):
    assert ANSWERS["chosen_letter"](text) is None


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


@pytest.mark.parametrize(("name", "texts", "answer"), [
    ("exact_match", ["The Louvre.", "louvre"], "louvre"),
    ("exact_match", ["", "the", "?"], None),
    ("first_word", ["signs, more", " signs"], "signs"),
    ("first_word", [" "], None),
    ("strict_match", ["#### 1,800", "3\n#### $1800.0\nmore"], "1800.0"),
    ("strict_match", ["18", "#### many"], None),
    ("last_number", ["1 and -0", "0.0"], "0.0"),
    ("stated_number", ["The answer is 5.", "the answer is $5.00, not 6"], "5.0"),
    ("chosen_letter", ["(C)", "The answer is C."], "C"),
    ("chosen_letter", ["none"], None),
])
def test_equal_answers_have_equal_values(name, texts, answer):
    assert {ANSWERS[name](text) for text in texts} == {answer}
    for gold in ("louvre", "signs", "1800", "0", "5", "C", ""):
        values = {METRICS[name](text, [gold]) for text in texts}
        assert len(values) == 1
        assert answer is not None or values == {0}


@pytest.mark.parametrize(("text", "answer"), [
    ("so\n#### 1,234,567\nQuestion: more\n#### 2", "1234567"), ("#### -3.5 ", "-3.5"), ("####72", "72"),
    ("#### a, b and 1,2", "a, b and 1,2"), ("no mark 5", None), ("#### \n5", None)])
def test_answer_after(text, answer):
    assert answer_after(text) == answer
    if answer:
        assert answer_after(text.replace("####", "The answer is"), marker="The answer is") == answer


def test_gsm8k_answers(test_data):
    golds = [json.loads(line)["answer"] for line in (test_data / "gsm8k/test.jsonl").open(encoding="utf-8")]
    assert all(float(answer_after(gold)) == float(gold.split("####")[1].replace(",", "")) for gold in golds)


def test_majority():
    assert majority(["4", "5", "5", None, None, None]) == "5"
    assert majority(["4", "5", "5", "4"]) == "4"
    assert majority([None, None]) is None
    assert majority([]) is None
