"""Our kinds of task on scripted models: gaps, reconstruction and open-ended texts, from local files."""

import json
import math

import numpy as np
import pytest

from dlm_jax.errors import ConfigError
from dlm_jax.evaluation.code_eval import Outcome
from dlm_jax.evaluation.eval_model import EvalModel
from dlm_jax.evaluation.own_tasks import cut_line, cut_next_line
from dlm_jax.evaluation.run import evaluate
from dlm_jax.evaluation.task_loading import load_tasks
from tests.evaluation.lm_eval_tasks import Scripted, encode

pytestmark = pytest.mark.usefixtures("offline")
STORY = {"InputSentence1": "One.", "InputSentence2": "Two.", "InputSentence3": "He ran!", "InputSentence4": "Four.",
         "RandomFifthSentenceQuiz1": "No.", "RandomFifthSentenceQuiz2": "Five.", "AnswerRightEnding": 2}
CODE = {"task_id": "SingleLineInfilling/HumanEval/0/L0", "entry_point": "f", "prompt": "def f(x):\n",
        "suffix": "    return y\n", "canonical_solution": "    y = 2 * x\n",
        "test": "def check(f):\n    assert f(2) == 4\n"}


@pytest.fixture
def load(tmp_path):
    def write(task, *rows, **settings):
        path = tmp_path / f"{task}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return load_tasks([task], data_files={task: str(path)}, **settings)

    return write


class Writer:
    """A model that writes given texts in turn, and keeps what it was asked."""

    def __init__(self, *texts, **settings):
        self.asked, self.calls, texts = [], [], iter(texts)

        def generate(requests, **call):
            self.asked += requests
            self.calls.append(call)
            return [next(texts) for _ in requests]

        self.eval_model = EvalModel(settings.pop("name", "writer"), encode, generate=generate, **settings)


def values_of(found, task, model="writer"):
    return {name: of["models"][model]["mean"] for name, of in found.tasks[task]["metrics"].items()}


def test_gaps_of_a_model_and_of_its_parent(load):
    model = Writer("He ran!")
    parent = Writer('He ran. He sat. "', name="parent", autoregressive=True)
    found = evaluate(load("rocstories", STORY), [model.eval_model, parent.eval_model])
    assert [(one.before, one.after, one.lengths) for one in model.asked] == [
        ("One. Two. ", " Four. Five.", range(4, 21))]
    assert [(one.before, one.after, one.lengths) for one in parent.asked] == [("One. Two. ", "", range(20, 21))]
    assert values_of(found, "rocstories") == {"rouge1": 1, "rouge2": 1, "rougeL": 1}
    assert values_of(found, "rocstories", "parent") == {"rouge1": 1, "rouge2": 1, "rougeL": 1}  # of one sentence
    assert found.tasks["rocstories"]["metrics"]["rougeL"]["difference"]["mean"] == 0
    small = Writer("x", max_length=12)
    evaluate(load("rocstories", STORY), [small.eval_model])
    assert small.asked[0].lengths == range(4, 7)


def test_programs_in_gaps(load):
    programs = []

    def sandbox(asked):
        programs.extend(asked)
        return [Outcome("2 * x" in program.source, "passed") for program in asked]

    model = Writer("    y = 2 * x\n", "    y = 0\n")
    parent = Writer(*["    y = 2 * x\n    return 3\n"] * 2, name="parent", autoregressive=True)
    tasks = load("humaneval_fim_single_line", CODE, CODE, sandbox=sandbox)
    found = evaluate(tasks, [model.eval_model, parent.eval_model])
    assert values_of(found, "humaneval_fim_single_line") == {"pass@1": 0.5}
    assert values_of(found, "humaneval_fim_single_line", "parent") == {"pass@1": 1}
    assert programs[0].source == CODE["prompt"] + CODE["canonical_solution"] + CODE["suffix"]
    assert programs[0].tests == CODE["test"] + "\ncheck(f)\n" and programs[2].source == programs[0].source
    with pytest.raises(ConfigError, match="humaneval_fim_single_line.*--allow_code_execution"):
        load("humaneval_fim_single_line", CODE)


def test_cuts_of_a_parents_code():
    suffix, solution = "    return y\n", "    y = 1\n"
    assert cut_line("    y = 1\n    return 0\n", suffix, solution) == "    y = 1\n"
    assert cut_line("\n    y = 1", suffix, solution) == "\n    y = 1\n" and cut_line("  \n", "", "") == "  \n"
    assert cut_next_line("    y = 1\n    y += 1\n    return y\nmore", suffix, solution) == "    y = 1\n    y += 1\n"
    assert cut_next_line("    y = 1\n", suffix, solution) == "    y = 1\n"
    inner = "    if x:\n        return y\n    return y + 1\n"
    assert cut_next_line(inner + "    return y\n", suffix, solution) == inner  # not at a line that holds the next one
    assert cut_next_line("max(abs(x), 1)\n    return y\n", ")\n    return y\n", "abs(x") == "max(abs(x), 1"


def test_reconstruction(load):
    def masked_accuracy(pairs, masked):
        return [mask.mean() for mask in masked]

    tasks = load("reconstruction", {"text": "one two three four five six seven eight nine ten"})
    guesser = EvalModel("guesser", encode, masked_accuracy=masked_accuracy)
    found = evaluate(tasks, [guesser])
    assert values_of(found, "reconstruction", "guesser") == pytest.approx(
        {f"{n}0% masked": n / 10 for n in (1, 3, 5, 7, 9)})
    with pytest.raises(ConfigError, match="silent.*reconstruction"):
        evaluate(tasks, [EvalModel("silent", encode)])


def test_generative_perplexity_by_hand(load):
    def score(pairs):
        return np.array([0.5 * len(pair.continuation) for pair in pairs])

    judge = EvalModel("judge", encode, score)
    prompts = [{"prompt": name} for name in ("one", "two", "three")]
    model = Writer(" a b", "", " a b c")
    found = evaluate(load("generation", *prompts), [model.eval_model], judge=judge)
    assert model.calls == [{"temperature": 1.0, "num_steps": None}] and model.asked[0].lengths == range(128, 129)
    values = values_of(found, "generation")
    assert values["generative_perplexity"] == pytest.approx(math.exp(2.5 / 5))
    assert values["distinct_1"] == pytest.approx(3 / 5) and values["words"] == pytest.approx(5 / 3)
    assert found.tasks["generation"]["metrics"]["distinct_1"]["models"]["writer"]["standard_error"] is None
    with pytest.raises(ConfigError, match="generation.*judge"):
        evaluate(load("generation", *prompts), [model.eval_model])


def test_texts(load):
    model = Scripted()
    found = evaluate(load("text", {"text": "a bc"}, {"text": "d"}), [model.eval_model])
    nats = Scripted.cost("a bc") + Scripted.cost("d")
    assert values_of(found, "text", "scripted")["bits_per_byte"] == pytest.approx(nats / 5 / math.log(2))
