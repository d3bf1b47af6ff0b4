"""The tasks of the paper's scripts: prompts, tokens, lengths, temperatures and metrics, on scripted models."""

import json

import pytest

from dlm_jax.errors import ConfigError, DataError
from dlm_jax.evaluation.code_eval import Outcome
from dlm_jax.evaluation.eval_model import EvalModel
from dlm_jax.evaluation.reference_protocol import marked_match, stripped_match
from dlm_jax.evaluation.run import evaluate
from dlm_jax.evaluation.task_loading import load_tasks
from tests.evaluation.lm_eval_tasks import decode, encode
from tests.evaluation.test_own_tasks import CODE, STORY

pytestmark = pytest.mark.usefixtures("offline")
HELLASWAG = {"activity_label": "Cooking", "ctx_a": "A man [header] stirs.", "ctx_b": "he", "label": "1",
             "endings": ["sleeps [step] well.", "eats.", "runs.", "sits."]}
WINOGRANDE = {"sentence": "Ann beat Eve so _ was glad.", "option1": "Ann", "option2": "Eve", "answer": "1"}


def ask(tmp_path, task, *rows, texts=(), cost=len, autoregressive=False, sandbox=None, **settings):
    """Returns the evaluation of a model that is scored by `cost` and writes `texts`, and what it was asked."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs, requests, texts = [], [], iter(texts)

    def score(asked):
        pairs.extend((decode(pair.context), decode(pair.continuation)) for pair in asked)
        return [float(cost(text)) for _, text in pairs[-len(asked):]]

    def generate(asked, **call):
        requests.extend((request, call) for request in asked)
        return [next(texts) for _ in asked]

    model = EvalModel("model", encode, score, generate, autoregressive=autoregressive,
                      encode_special=lambda text: encode("<bos>" + text) if text else [], **settings)
    tasks = load_tasks([task], data_files={task: str(path)}, sandbox=sandbox)
    found = evaluate(tasks, [model], reference=True).tasks[task]["metrics"]
    return {name: of["models"]["model"]["mean"] for name, of in found.items()}, pairs, requests


@pytest.mark.parametrize(("task", "row", "expected", "parent"), [
    ("diffullama_hellaswag", HELLASWAG, [("Cooking: A man stirs. He", "sleeps well."),
                                         ("Cooking: A man stirs. He", "eats.")], None),
    ("diffullama_winogrande", WINOGRANDE, [("Ann beat Eve so ", "Annwas glad."), ("Ann beat Eve so ", "Evewas glad.")],
     [("Ann beat Eve so ", "Ann was glad."), ("Ann beat Eve so ", "Eve was glad.")]),
    ("diffullama_piqa", {"goal": "Cut it?", "sol1": "Saw.", "sol2": "Sew.", "label": 0},
     [("Question: Cut it?\nAnswer: ", " Saw."), ("Question: Cut it?\nAnswer: ", " Sew.")], None),
    ("diffullama_social_iqa", {"context": "Al ran.", "question": "Why?", "answerA": "fun", "answerB": "fear",
                               "answerC": "no", "label": "2"},
     [("Question: Al ran. Why?\nAnswer: ", answer) for answer in ("fun", "fear", "no")], None),
])
def test_choices(tmp_path, task, row, expected, parent):
    with_bos = task in ("diffullama_hellaswag", "diffullama_piqa")
    for autoregressive, options in ((False, expected), (True, parent or expected)):
        _, pairs, _ = ask(tmp_path, task, row, autoregressive=autoregressive)
        assert [(context, text.removeprefix("<bos>")) for context, text in pairs][: len(options)] == [
            ("<bos>" + context, option) for context, option in options]
        assert all(text.startswith("<bos>") == with_bos for _, text in pairs)


def test_parents_are_normalized_by_tokens(tmp_path):
    """" was" costs 3 more; the mean over tokens decides for a parent's HellaSwag and WinoGrande."""
    row = {**WINOGRANDE, "option1": "Ann or so", "option2": "Eve", "answer": "1"}
    cost = {True: lambda text: 2.0 + len(text.split()), False: lambda text: 2.0 + len(text.split())}
    normalized, _, _ = ask(tmp_path, "diffullama_winogrande", row, cost=cost[True], autoregressive=True)
    summed, _, _ = ask(tmp_path, "diffullama_winogrande", row, cost=cost[False])
    assert normalized == {"acc": 1.0} and summed == {"acc": 0.0}


@pytest.mark.parametrize(("task", "row", "prompt", "length", "text", "values", "steps", "temperature"), [
    ("diffullama_lambada", {"text": "he shook his head"}, "he shook his", 1, " head ", {"stripped_match": 1}, 256, 1.0),
    ("diffullama_triviaqa", {"question": "Who?", "answer": {"value": "Al", "aliases": ["Al", "Bo of X"]}},
     "Question: Who?\nAnswer: ", 3, "it is al, yes", {"contains": 1, "f1": 0.4}, 256, 1.0),
    ("diffullama_squad", {"context": "Rome fell.", "question": "What fell?", "answers": {"text": ["Rome", "It"]}},
     "Rome fell.\nQuesionWhat fell??\nAnswer: ", 1, "Rome", {"contains": 1, "f1": 1}, 256, 1.0),
    ("diffullama_gsm8k", {"question": "one and one?", "answer": "so\n#### 1,002"}, "one and one?", 256 - 3,
     "x #### 1002", {"marked_match": 1}, 64, 0.0),
    ("diffullama_gsm8k_icot", {"text": "1+1?||<<1+1=2>> #### 2"}, "1+1?\n", 256 - 1, "#### 3", {"marked_match": 0},
     64, 0.0),
])
def test_texts(tmp_path, task, row, prompt, length, text, values, steps, temperature):
    for autoregressive in (False, True):
        found, _, ((request, call),) = ask(tmp_path, task, row, texts=[text], autoregressive=autoregressive)
        assert request.before == prompt and request.lengths == range(length, length + 1)
        assert call == {"num_steps": steps, "temperature": 0.0 if autoregressive else temperature}
        assert found == pytest.approx(values)


def test_gaps(tmp_path):
    settings = {"reference_temperature": 0.9}
    found, _, ((request, call),) = ask(tmp_path, "diffullama_rocstories", STORY, texts=["He ran!"], **settings)
    assert (request.before, request.after, request.lengths) == ("One. Two. ", " Four. Five.", range(2, 3))
    assert call == {"num_steps": 32, "temperature": 0.9} and found == {"rouge1": 1, "rouge2": 1, "rougeL": 1}
    _, _, ((request, call),) = ask(tmp_path, "diffullama_rocstories", STORY, texts=["He. No."], autoregressive=True)
    assert request.after == "" and request.lengths == range(7, 8) and call["temperature"] == 0  # characters


def test_programs(tmp_path):
    long = {**CODE, "prompt": "# " + "a " * 1001 + "\n" + CODE["prompt"]}

    def sandbox(programs):
        return [Outcome("2 * x" in program.source, "") for program in programs]

    task = "diffullama_humaneval_fim_single_line"
    found, _, asked = ask(tmp_path, task, long, CODE, texts=["    y = 2 * x\n"], sandbox=sandbox, autoregressive=True)
    (request, _), = asked  # the long one is skipped
    assert found == {"pass@1": 1.0} and request.before == (
        f"The prefix is: {CODE['prompt']} and the suffix is: {CODE['suffix']}, please return the middle code: ")
    with pytest.raises(DataError, match=task):
        ask(tmp_path, task, long, sandbox=sandbox)


def test_protocols_are_not_mixed(tmp_path):
    (tmp_path / "piqa.jsonl").write_text(json.dumps({"goal": "g", "sol1": "a", "sol2": "b", "label": 0}) + "\n")
    tasks = load_tasks(["piqa"], data_dir=str(tmp_path))
    with pytest.raises(ConfigError, match="diffullama_"):
        evaluate(tasks, [EvalModel("model", encode)], reference=True)


def test_metrics_by_hand():
    assert stripped_match(" signs ", ["signs"]) == 1 and stripped_match("signs.", ["signs"]) == 0
    assert marked_match("a #### 1,800", ["so #### 1800"]) == 1 and marked_match("#### 1800.0", ["#### 1800"]) == 0
