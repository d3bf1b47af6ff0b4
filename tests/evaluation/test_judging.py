"""What of a text is judged, and what several samples reach together, by hand."""

import pytest

from dlm_jax.evaluation.code_execution import Outcome
from dlm_jax.evaluation.eval_model import EvalModel
from dlm_jax.evaluation.items import Item
from dlm_jax.evaluation.run import extract_answer, judge_generation, truncate
from dlm_jax.evaluation.tasks import TASKS


@pytest.mark.parametrize(("text", "how", "part"), [
    ('"Go!" he said.', "sentence", '"Go!"'),
    ("\n one \ntwo", "line", "one"),
    (" 1 + 1\n\n#### 2\n\nQuestion: 3?", "answer", "1 + 1\n\n#### 2"),
    ("It is 2.\nQ: 3?", "answer", "It is 2."),
    ("No Question: at a line's start", "answer", "No Question: at a line's start"),
    (" a\nb ", "all", "a\nb"),
])
def test_parts_of_texts(text, how, part):
    assert truncate(text, how) == part


def test_under_the_release_all_of_a_text_counts():
    model = EvalModel("model", list)
    assert extract_answer(TASKS["lambada"], model, Item(), " a\nb", True) == " a\nb"
    assert extract_answer(TASKS["lambada"], model, Item(), " a\nb", False) == "a"


def test_samples_vote_by_the_tasks_first_metric():
    item = Item(answers=("18",))
    texts = ["It is 4.", "The answer is 18, and 5", "so 18.0", "4 or 5", "$18", "none"]
    record = judge_generation(TASKS["mawps"], item, texts, texts, False)
    # Last numbers: 4, 5, 18, 5, 18, none. Of 5 and 18 the 5 was seen first.
    assert record["votes"] == ["4.0", "5.0", "18.0", "5.0", "18.0", None]
    assert record["values"] == pytest.approx({"last_number": 2 / 6, "stated_number": 1 / 6, "majority": 0, "hit": 1})
    record = judge_generation(TASKS["mawps"], item, texts[2:], texts[2:], False)
    assert record["values"]["majority"] == 1
    assert record["texts"] == record["predictions"] == texts[2:] and record["answers"] == ["18"]


def test_short_answers_vote_when_normalised_and_none_is_no_answer():
    item = Item(answers=("Eiffel Tower",))
    texts = ["the Eiffel tower!", "Louvre", "", "", "", "Eiffel Tower"]
    record = judge_generation(TASKS["triviaqa"], item, texts, texts, False)
    assert record["votes"] == ["eiffel tower", "louvre", None, None, None, "eiffel tower"]
    assert record["values"]["majority"] == record["values"]["hit"] == 1
    assert record["values"]["exact_match"] == pytest.approx(2 / 6)
    record = judge_generation(TASKS["satmath"], Item(answers=("B",)), ["?", "!"], ["?", "!"], False)
    assert record["values"] == {"chosen_letter": 0, "majority": 0, "hit": 0}


def test_what_tells_no_right_from_wrong_has_only_means():
    texts = ["He ran.", "She sat."]
    record = judge_generation(TASKS["rocstories"], Item(answers=("He ran.",)), texts, texts, False)
    assert record["values"] == {"rouge1": 0.5, "rouge2": 0.5, "rougeL": 0.5}


def test_programs_are_judged_by_how_they_went():
    task, item = TASKS["humaneval_infilling"], Item(tests="check(f)")
    outcomes = [Outcome(False, "NameError"), Outcome(True, "passed"), Outcome(False, "NameError")]
    record = judge_generation(task, item, ["a", "b", "c"], ["a", "b", "c"], False, outcomes)
    assert record["values"] == pytest.approx({"pass_at_1": 1 / 3, "hit": 1})
    assert record["outcomes"] == ["NameError", "passed", "NameError"]
    assert judge_generation(task, item, ["a"], ["a"], False, outcomes[:1]) == {
        "text": "a", "prediction": "a", "outcomes": ["NameError"], "values": {"pass_at_1": 0}}
