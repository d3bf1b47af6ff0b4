"""Items: the fields of every task under both protocols, malformed rows, and answers of scripted models."""

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


HELLASWAG = {"activity_label": "Cooking", "ctx_a": "A man [header] stirs.", "ctx_b": "he", "label": "1",
             "endings": ["sleeps [step] well.", "eats."]}
WINOGRANDE = {"sentence": "Ann beat Eve so _ was glad.", "option1": "Ann", "option2": "Eve", "answer": "1"}
SQUAD = {"context": "Rome fell.", "question": "What fell?",
         "answers": {"text": ["Rome", "Rome", "It"], "answer_start": [0]}}


def items_of(tmp_path, name, *rows, reference=False):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_items(find_task(name), str(path), reference=reference)


@pytest.mark.parametrize(("name", "row", "options", "reference"), [
    ("hellaswag", HELLASWAG,
     [("Cooking: A man stirs. He", " sleeps well."), ("Cooking: A man stirs. He", " eats.")],
     [("Cooking: A man stirs. He", "sleeps well."), ("Cooking: A man stirs. He", "eats.")]),
    ("winogrande", WINOGRANDE,
     [("Ann beat Eve so Ann", " was glad."), ("Ann beat Eve so Eve", " was glad.")],
     [("Ann beat Eve so ", "Annwas glad."), ("Ann beat Eve so ", "Evewas glad.")]),
    ("piqa", {"goal": "Cut it?", "sol1": "Saw.", "sol2": "Sew.", "label": 0},
     [("Question: Cut it?\nAnswer:", " Saw."), ("Question: Cut it?\nAnswer:", " Sew.")],
     [("Question: Cut it?\nAnswer: ", " Saw."), ("Question: Cut it?\nAnswer: ", " Sew.")]),
    ("siqa", {"context": "Al ran.", "question": "Why?", "answerA": "fun", "answerB": "fear", "answerC": "no",
              "label": "2"},
     [("Question: Al ran. Why?\nAnswer:", f" {answer}") for answer in ("fun", "fear", "no")],
     [("Question: Al ran. Why?\nAnswer: ", answer) for answer in ("fun", "fear", "no")]),
])
def test_options_of_the_original_fields(tmp_path, name, row, options, reference):
    item, = items_of(tmp_path, name, row)
    assert list(item.options) == options
    assert item.gold == {"hellaswag": 1, "winogrande": 0, "piqa": 0, "siqa": 1}[name]
    item, = items_of(tmp_path, name, row, reference=True)
    assert list(item.options) == reference


def test_winogrande_options_of_the_reference_parent(tmp_path):
    item, = items_of(tmp_path, "winogrande", WINOGRANDE, reference=True)
    assert item.parent_options == (("Ann beat Eve so ", "Ann was glad."), ("Ann beat Eve so ", "Eve was glad."))


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


@pytest.mark.parametrize(("name", "row", "prompt", "answers"), [
    ("lambada", {"text": "he shook his head"}, "he shook his", ("head",)),
    ("triviaqa", {"question": "Who?", "answer": {"value": "Al", "aliases": ["Al", "Bo"]}}, "Question: Who?\nAnswer:",
     ("Al", "Bo")),
    ("triviaqa", {"context": "Question: Who?\nAnswer:", "answer": "Al", "aliases": ["Bo"]}, "Question: Who?\nAnswer:",
     ("Al", "Bo")),
    ("squad", SQUAD, "Rome fell.\nQuestion: What fell?\nAnswer:", ("Rome", "It")),
    ("gsm8k", {"question": "1+1?", "answer": "<<1+1=2>>2\n#### 1,002"}, "Question: 1+1?\nAnswer:", ("1002",)),
])
def test_prompts_and_answers(tmp_path, name, row, prompt, answers):
    item, = items_of(tmp_path, name, row)
    assert (item.prompt, item.answers) == (prompt, answers)


def test_squad_file_and_reference_prompt(tmp_path):
    file = {"data": [{"paragraphs": [{"context": "Rome fell.", "qas": [
        {"question": "What fell?", "answers": [{"text": "Rome", "answer_start": 0}]},
        {"question": "How?", "answers": [{"text": "fell"}]}]}]}]}
    first, second = items_of(tmp_path, "squad", file, reference=True)
    assert first.prompt == "Rome fell.\nQuesionWhat fell??\nAnswer: " and second.answers == ("fell",)


@pytest.mark.parametrize(("name", "row", "mentions"), [
    ("hellaswag", {**HELLASWAG, "endings": "one"}, "'endings'"),
    ("hellaswag", {**HELLASWAG, "label": "2"}, "'label'"),
    ("winogrande", {**WINOGRANDE, "answer": ""}, "'answer'"),
    ("winogrande", {**WINOGRANDE, "sentence": "none"}, "_ in the sentence"),
    ("piqa", {"goal": "x"}, "'sol1'"),
    ("squad", {"data": [{}]}, "SQuAD"),
    ("lambada", {"text": "word"}, "words"),
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


def test_few_shot_prefix(tmp_path):
    shown = items_of(tmp_path, "gsm8k", {"question": "1+1?", "answer": "#### 2"}) + items_of(
        tmp_path, "winogrande", WINOGRANDE)
    assert few_shot_prefix(shown) == "Question: 1+1?\nAnswer: #### 2\n\nAnn beat Eve so Ann was glad.\n\n"
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
