"""Programs with a gap: requests, completed programs, and scripted models whose programs are executed."""

import gzip
import json

import pytest

from dlm_jax.errors import ConfigError, DataError
from dlm_jax.evaluation.code_execution import Sandbox, completed, truncate_code
from dlm_jax.evaluation.eval_model import EvalModel
from dlm_jax.evaluation.run import Job, request_of, run
from dlm_jax.evaluation.tasks import TASKS, find_file, load_items

ROW = {"task_id": "SingleLineInfilling/HumanEval/0/L0", "entry_point": "double", "prompt": "def double(x):\n",
       "suffix": "    return y\n", "canonical_solution": "    y = 2 * x\n",
       "test": "def check(candidate):\n    assert candidate(4) == 8\n"}
TASK = TASKS["humaneval_infilling"]


def items_of(tmp_path, *rows, reference=False):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return load_items(TASK, str(path), reference=reference)


@pytest.fixture(scope="module")
def sandbox():
    try:
        return Sandbox(seconds=2)
    except ConfigError as error:
        pytest.skip(f"this machine cannot isolate programs: {error}")


def words(text):
    return [len(word) for word in text.split(" ")]


def test_requests_and_programs(tmp_path):
    item, = items_of(tmp_path, ROW)
    assert (item.prompt, item.suffix, item.solution) == (ROW["prompt"], ROW["suffix"], ROW["canonical_solution"])
    program = completed(item, "    y = 0\n")
    assert program.source == "def double(x):\n    y = 0\n    return y\n"
    assert program.tests == ROW["test"] + "\ncheck(double)\n"
    model, parent = EvalModel("model", words), EvalModel("parent", words, autoregressive=True)
    request = request_of(model, TASK, item, 3, sample=2)
    assert (request.before, request.after, request.lengths) == (ROW["prompt"], ROW["suffix"], range(3, 41))
    assert (request.item, request.sample) == (3, 2)
    request = request_of(parent, TASK, item, 0)
    assert (request.before, request.after, request.lengths) == (ROW["prompt"], "", range(40, 41))
    small = EvalModel("small", words, max_length=20)
    assert request_of(small, TASK, item, 0).lengths == range(3, 11)


def test_lengths_of_long_gaps(tmp_path):
    several, span = items_of(tmp_path, {**ROW, "task_id": "MultiLineInfilling/HumanEval/0/L0_L0"},
                             {**ROW, "task_id": "RandomSpanInfilling/HumanEval/0/1"})
    model = EvalModel("model", words)
    assert request_of(model, TASK, several, 0).lengths == range(16, 241, 16) and not several.one_line
    assert request_of(model, TASK, span, 0).lengths == range(4, 97, 4)
    assert request_of(EvalModel("small", words, max_length=40), TASK, several, 0).lengths == range(16, 21, 16)
    with pytest.raises(DataError, match="rows.jsonl.gz, line 1: .*HumanEval/0"):
        items_of(tmp_path, {**ROW, "task_id": "HumanEval/0"})


def test_truncate_code(tmp_path):
    line, = items_of(tmp_path, ROW)
    assert truncate_code(line, "    y = 1\n    return 0\n") == "    y = 1\n"
    assert truncate_code(line, "\n    y = 1") == "\n    y = 1\n"
    assert truncate_code(line, "  \n") == "  \n"
    several, = items_of(tmp_path, {**ROW, "task_id": "MultiLineInfilling/HumanEval/0/L0_L0"})
    assert truncate_code(several, "    y = 1\n    y += 1\n    return y\nmore") == "    y = 1\n    y += 1\n"
    assert truncate_code(several, "    y = 1\n") == "    y = 1\n"
    inner = "    if x:\n        return y\n    return y + 1\n"
    assert truncate_code(several, inner + "    return y\n") == inner  # not at a line that holds the next one
    span, = items_of(tmp_path, {**ROW, "task_id": "RandomSpanInfilling/HumanEval/0/1", "suffix": ")\n    return y\n",
                                "canonical_solution": "abs(x"})
    assert truncate_code(span, "max(abs(x), 1)\n    return y\n") == "max(abs(x), 1"


def test_model_and_parent(tmp_path, sandbox):
    def generate(requests, *, temperature, num_steps):
        return [["    y = x + x\n", "    y = 9\n", "    y = \n"][request.item] for request in requests]

    def continue_text(requests, **settings):
        return ["    y = 2 * x\n    return 3\n" for _ in requests]

    items = items_of(tmp_path, *[ROW] * 3)
    eval_models = [EvalModel("model", words, generate=generate),
                   EvalModel("parent", words, generate=continue_text, autoregressive=True)]
    records = run([Job(TASK, items, "An example.\n\n")], eval_models, execute=sandbox)
    assert [record["values"]["pass_at_1"] for record in records] == [1, 0, 0, 1, 1, 1]
    assert [record["outcomes"] for record in records[:3]] == [["passed"], ["AssertionError"], ["SyntaxError"]]
    assert records[3]["prediction"] == "    y = 2 * x\n"
    with pytest.raises(ConfigError, match="humaneval_infilling"):
        run([Job(TASK, items)], eval_models)


def test_pass_rate_of_samples(tmp_path, sandbox):
    def generate(requests, *, temperature, num_steps):
        assert temperature == 0.5
        right = {(0, 1), (0, 3)}
        return ["    y = 2 * x\n" if (request.item, request.sample) in right else "    y = 0\n" for request in requests]

    records = run([Job(TASK, items_of(tmp_path, ROW, ROW))], [EvalModel("model", words, generate=generate)], samples=4,
                  temperature=0.5, execute=sandbox)
    assert [record["values"] for record in records] == [{"pass_at_1": 0.5, "hit": 1}, {"pass_at_1": 0, "hit": 0}]


def test_reference_lengths_and_long_items(tmp_path, sandbox):
    asked = []

    def generate(requests, **settings):
        asked.extend((request, settings) for request in requests)
        return [ROW["canonical_solution"]] * len(requests)

    long = {**ROW, "prompt": "# " + "a " * 982 + "\n" + ROW["prompt"]}
    longer = {**ROW, "prompt": "# " + "a " * 983 + "\n" + ROW["prompt"]}
    items = items_of(tmp_path, longer, ROW, long, reference=True)
    eval_models = [EvalModel("model", words, generate=generate, reference_temperature=0.9),
                  EvalModel("parent", words, generate=generate, autoregressive=True)]
    records = run([Job(TASK, items)], eval_models, reference=True, execute=sandbox)
    assert [(record["model"], record["item"]) for record in records] == [
        ("model", 1), ("model", 2), ("parent", 1), ("parent", 2)]
    assert [record["values"] for record in records] == [{"pass_at_1": 1.0}] * 4
    (request, settings), (parents, parent_settings) = asked[0], asked[2]
    assert request.lengths == range(9, 10) and settings == {"temperature": 0.9, "num_steps": 32}
    assert parents.lengths == range(14, 15) and parent_settings["temperature"] == 0  # characters of the solution
    assert parents.before == (f"The prefix is: {ROW['prompt']} and the suffix is: {ROW['suffix']}, please return the "
                              "middle code: ")
    with pytest.raises(DataError, match="humaneval_infilling"):
        run([Job(TASK, items[:1])], eval_models, reference=True, execute=sandbox)


def test_real_files(test_data, sandbox):
    path = find_file(TASK, str(test_data))
    assert path.endswith("HumanEval-SingleLineInfilling.jsonl.gz")
    items = load_items(TASK, path)
    assert len(items) == 1033 and all(item.one_line for item in items)
    chosen = items[::40]
    assert all(outcome.passed for outcome in sandbox([completed(item, item.solution) for item in chosen]))
    assert not any(outcome.passed for outcome in sandbox([completed(item, "    raise ValueError\n")
                                                          for item in chosen[:4]]))
    for split, count in (("MultiLine", 5815), ("RandomSpan", 1640), ("RandomSpanInfillingLight", 164)):
        name = split if split.endswith("Light") else f"{split}Infilling"
        items = load_items(TASK, str(test_data / "humaneval_infilling" / f"HumanEval-{name}.jsonl.gz"))
        assert len(items) == count
        assert all(outcome.passed for outcome in sandbox([completed(item, item.solution) for item in items[:8]]))
