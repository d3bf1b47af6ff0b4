"""Items with reasoning: the formats of their files, and the values of scripted models."""

import json

import pytest

from dlm_jax.errors import DataError
from dlm_jax.evaluation.eval_model import EvalModel
from dlm_jax.evaluation.run import Job, run
from dlm_jax.evaluation.tasks import few_shot_prefix, find_task, load_items

GSM8K = {"question": "1+1?", "answer": "One and one\nare <<1+1=2>>2.\n#### 2"}
AGIEVAL = {"passage": "", "question": "If $k=3$, what is $3k+1$?", "options": ["(A)2", "(B) 4", "(C)9", "(D)10"],
           "label": "D", "other": {"solution": "Choice D is correct.\nIt is 10."}}
HUB = {"query": "Q: If $k=3$, what is $3k+1$? Answer Choices: (A)2 (B) 4 (C)9 (D)10\n"
                "A: Among A through D, the answer is", "choices": ["(A)2", "(B) 4", "(C)9", "(D)10"], "gold": [3]}
ASKED = "Question: If $k=3$, what is $3k+1$?\nA) 2\nB) 4\nC) 9\nD) 10\nAnswer:"
MAWPS = {"id": "a", "question": "Tom had 3 and got 1.5. How many? ", "result": "4_1/2", "result_float": 4.5}


def items_of(tmp_path, name, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_items(find_task(name), str(path))


@pytest.mark.parametrize(("name", "row", "prompt", "answer", "solution"), [
    ("gsm8k", GSM8K, "Question: 1+1?\nAnswer:", "2", " " + GSM8K["answer"]),
    ("gsm8k_cot", GSM8K, "Question: 1+1?\nAnswer: Let's think step by step.", "2",
     " One and one are 2. The answer is 2."),
    ("gsm8k_icot", {"text": "1+1?||<<1+1=2>> #### 2"}, "1+1?\n", "2", "<<1+1=2>> #### 2"),
    ("mawps", MAWPS, "Question: Tom had 3 and got 1.5. How many?\nAnswer:", "4.5", " 4.5"),
    ("mawps", {"question": "How many?", "result": "1,250"}, "Question: How many?\nAnswer:", "1250", " 1250"),
    ("mawps", {"iIndex": 3, "sQuestion": " How many? ", "lEquations": ["X=39"], "lSolutions": [39.0]},
     "Question: How many?\nAnswer:", "39", " 39"),
    ("mawps_cot", MAWPS, "Question: Tom had 3 and got 1.5. How many?\nAnswer: Let's think step by step.", "4.5", ""),
    ("satmath", AGIEVAL, ASKED, "D", " D"),
    ("satmath", HUB, ASKED, "D", " D"),
    ("satmath", {**AGIEVAL, "passage": "Read this."}, ASKED.replace("If", "Read this.\nIf"), "D", " D"),
    ("satmath_cot", AGIEVAL, ASKED + " Let's think step by step.", "D",
     " Choice D is correct. It is 10. The answer is D."),
    ("satmath_cot", HUB, ASKED + " Let's think step by step.", "D", ""),
])
def test_file_formats(tmp_path, name, row, prompt, answer, solution):
    item, = items_of(tmp_path, name, row)
    assert (item.prompt, item.answers, item.solution) == (prompt, (answer,), solution)


@pytest.mark.parametrize(("name", "row", "mentions"), [
    ("gsm8k", {"question": "x", "answer": "y"}, "####"),
    ("mawps", {"question": "x", "result": "many"}, "'result'"),
    ("mawps", {"question": "x"}, "'result'"),
    ("mawps", {"sQuestion": "x", "lSolutions": [1, 2]}, "'lSolutions'"),
    ("mawps", {"text": "x"}, "'question'"),
    ("satmath", {**AGIEVAL, "label": "E"}, "'E'"),
    ("satmath", {**AGIEVAL, "label": "AB"}, "'AB'"),
    ("satmath", {**AGIEVAL, "label": ""}, "''"),
    ("satmath", {**AGIEVAL, "options": None}, "'options'"),
    ("satmath", {**HUB, "gold": [0, 1]}, "[0, 1]"),
    ("satmath", {**HUB, "query": "Q: x"}, "Answer Choices:"),
])
def test_malformed_rows(tmp_path, name, row, mentions):
    with pytest.raises(DataError) as error:
        items_of(tmp_path, name, row)
    assert mentions in str(error.value) and "rows.jsonl, line 1" in str(error.value)


def test_few_shot_prefix_with_reasoning(tmp_path):
    shown = items_of(tmp_path, "gsm8k_cot", GSM8K)
    assert few_shot_prefix(shown) == (
        "Question: 1+1?\nAnswer: Let's think step by step. One and one are 2. The answer is 2.\n\n")
    assert few_shot_prefix(items_of(tmp_path, "satmath", HUB)) == ASKED + " D\n\n"
    with pytest.raises(DataError, match="example 0"):
        few_shot_prefix(items_of(tmp_path, "mawps_cot", MAWPS))


def scripted(*texts):
    def generate(requests, *, temperature, num_steps):
        return [texts[request.item][request.sample] for request in requests]

    return EvalModel("model", list, generate=generate)


def test_numbers_by_hand(tmp_path):
    items = items_of(tmp_path, "mawps", *[MAWPS] * 3)
    model = scripted([" 4.5 apples\n7"], ["The answer is 4.5, not 3"], ["none"])
    assert [record["values"] for record in run([Job(find_task("mawps"), items)], [model])] == [
        {"last_number": 1, "stated_number": 0}, {"last_number": 0, "stated_number": 1},
        {"last_number": 0, "stated_number": 0}]
    items = items_of(tmp_path, "mawps_cot", MAWPS)
    model = scripted([" 3 and 1.5.\nThe answer is 4.50.\n\nQuestion: And 7?\nAnswer: 7"])
    assert run([Job(find_task("mawps_cot"), items)], [model])[0]["values"] == {"last_number": 1, "stated_number": 1}


def test_letters_by_hand(tmp_path):
    items = items_of(tmp_path, "satmath", *[AGIEVAL] * 4)
    model = scripted([" D) 10"], ["(D)"], [" C\nD"], ["A line"])
    assert [record["values"]["chosen_letter"] for record in run([Job(find_task("satmath"), items)], [model])] == [
        1, 1, 0, 0]
    items = items_of(tmp_path, "satmath_cot", *[AGIEVAL] * 3)
    model = scripted(["Not (A).\nThe answer is D.\nQuestion: x\nAnswer: The answer is A."], ["So (A), no, (D) 10"],
                     ["(D), no, the answer is (A)."])
    assert [record["values"]["chosen_letter"] for record in run([Job(find_task("satmath_cot"), items)], [model])] == [
        1, 1, 0]


def test_self_consistency_by_hand(tmp_path):
    items = items_of(tmp_path, "satmath_cot", AGIEVAL, AGIEVAL, AGIEVAL)
    model = scripted(["The answer is A", "The answer is D", "The answer is D"],
                     ["The answer is A", "The answer is D", "The answer is B"], ["?", "The answer is C", "?"])
    records = run([Job(find_task("satmath_cot"), items)], [model], samples=3, temperature=0.7)
    assert [record["values"] for record in records] == [
        pytest.approx({"chosen_letter": 2 / 3, "majority": 1, "hit": 1}),
        pytest.approx({"chosen_letter": 1 / 3, "majority": 0, "hit": 1}),
        pytest.approx({"chosen_letter": 0, "majority": 0, "hit": 0})]
