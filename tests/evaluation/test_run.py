"""Runs of scripted models: tables by hand, resumed runs, and the judging of samples."""

import math

import pytest

from dlm_jax.errors import ConfigError, DataError
from dlm_jax.evaluation.code_execution import Outcome
from dlm_jax.evaluation.eval_model import EvalModel, Pair
from dlm_jax.evaluation.items import Item
from dlm_jax.evaluation.report import markdown_report, summarize, table
from dlm_jax.evaluation.run import Job, extract_answer, judge_generation, pairs_of, request_of, run, truncate
from dlm_jax.evaluation.tasks import TASKS

WORDS = ["<bos>"]


def encode(text):
    """Returns a token per word, each with the space before it."""
    words = text.replace(" ", "\0 ").split("\0")
    for word in words:
        if word and word not in WORDS:
            WORDS.append(word)
    return [WORDS.index(word) for word in words if word]


def scripted(name, cost, **settings):
    """Returns a model that scores a continuation by `cost` of its text."""
    def score(pairs):
        return [cost("".join(WORDS[token] for token in pair.continuation)) for pair in pairs]

    return EvalModel(name, encode, score, **settings)


def choice(*options, gold=0):
    return Item(tuple(("Q:", f" {option}") for option in options), gold=gold)


ITEMS = [choice("aa", "bbbbbb", gold=0), choice("c", "dd", gold=1), choice("e", "ff", gold=0)]
JOB = Job(TASKS["piqa"], ITEMS)


def test_accuracies_by_hand():
    short, even = scripted("short", len), scripted("even", lambda text: len(text) ** 0.5)
    records = run([JOB], [short, even])
    assert [record["picks"] for record in records[:3]] == [[0, 0], [0, 0], [0, 0]]
    assert [record["picks"] for record in records[3:]] == [[0, 1], [0, 1], [0, 1]]
    found = summarize(records, ["piqa"], ["short", "even"])["piqa"]
    assert found["items"] == 3
    assert found["models"]["short"]["accuracy"]["mean"] == pytest.approx(2 / 3)
    assert found["models"]["short"]["accuracy"]["standard_error"] == pytest.approx((2 / 9 / 2) ** 0.5)
    assert found["models"]["even"]["accuracy_normalized"]["mean"] == pytest.approx(1 / 3)
    assert found["differences"]["accuracy"]["mean"] == found["differences"]["accuracy"]["standard_error"] == 0
    difference = found["differences"]["accuracy_normalized"]  # 1, -1, 1
    assert difference["mean"] == pytest.approx(1 / 3)
    assert difference["standard_error"] == pytest.approx(((2 * (2 / 3) ** 2 + (4 / 3) ** 2) / 2 / 3) ** 0.5)
    assert difference["low"] == -1 and difference["high"] == 1
    lines = table({"piqa": found}, ["short", "even"]).splitlines()
    assert lines[1].split() == "piqa accuracy 3 66.7 ± 33.3 66.7 ± 33.3 +0.0 [+0.0, +0.0]".split()


def test_equal_values_have_a_limit():
    means = {name: {"mean": mean, "standard_error": 0.0, "count": 3} for name, mean in
             (("none", 0.0), ("all", 1.0), ("half", 0.5))}
    lines = table({"task": {"items": 3, "models": {"model": means}}}, ["model"]).splitlines()
    assert [line.split("  ")[-1].strip() for line in lines[1:]] == ["0.0 (< 63.2)", "100.0 (> 36.8)", "50.0 ± 0.0"]


def test_reference_normalization_of_parents():
    parent = scripted("parent", lambda text: 10.0 - text.count(" w"), autoregressive=True)
    item = Item((("Q:", " v"), ("Q:", " w w")), gold=1)
    for name, values in (("hellaswag", {"accuracy": 1.0}), ("piqa", {"accuracy": 1.0})):
        assert run([Job(TASKS[name], [item])], [parent], reference=True)[0]["values"] == values
    long = scripted("parent", lambda text: 3.0 * text.count(" "), autoregressive=True)
    item = Item((("Q:", " v"), ("Q:", " w w")), gold=0)
    assert run([Job(TASKS["piqa"], [item])], [long], reference=True)[0]["picks"] == [0]
    costly = scripted("parent", lambda text: 2.0 + text.count(" "), autoregressive=True)
    assert run([Job(TASKS["hellaswag"], [item])], [costly], reference=True)[0]["picks"] == [1]  # 4 / 2 < 3 / 1


def test_generation_by_hand():
    def generate(requests, *, temperature, num_steps):
        assert (temperature, num_steps) == (0.0, 5)
        return [{"one": " signs, more\nsigns", "two": "\n\nsign"}[request.before] for request in requests]

    items = [Item(prompt=prompt, answers=("signs",), solution=" signs") for prompt in ("one", "two")]
    records = run([Job(TASKS["lambada"], items)], [EvalModel("written", encode, generate=generate)], num_steps=5)
    assert [record["values"]["first_word"] for record in records] == [1, 0]
    assert [record["prediction"] for record in records] == ["signs, more", "sign"]


def test_infilling_by_an_autoregressive_model():
    seen = []

    def generate(requests, **settings):
        seen.extend(requests)
        return ['He ran. He sat. "']

    item = Item(prompt="One. ", suffix=" Four.", answers=("He ran!",), solution="He ran!")
    parent = EvalModel("parent", encode, generate=generate, autoregressive=True)
    record, = run([Job(TASKS["rocstories"], [item])], [parent])
    assert seen[0].after == "" and list(seen[0].lengths) == [20]
    assert record["prediction"] == "He ran." and record["values"] == {"rouge1": 1, "rouge2": 1, "rougeL": 1}
    assert request_of(EvalModel("model", encode), TASKS["rocstories"], item, 0).lengths == range(4, 21)
    assert request_of(EvalModel("model", encode), TASKS["rocstories"], item, 0, reference=True).lengths == range(2, 3)
    assert request_of(parent, TASKS["rocstories"], item, 0, reference=True).lengths == range(7, 8)


def test_text_longer_than_a_row():
    model = scripted("model", lambda text: math.log(2) * text.count("x"), max_length=3)
    job = Job(TASKS["text"], [Item(options=(("", "x x x x x"),)), Item(options=(("", "é"),))])
    records = run([job], [model])
    assert len(pairs_of(model, job.task, job.items[0], 0)) == 3
    assert records[0]["values"] == {"nats": pytest.approx(5 * math.log(2)), "tokens": 5, "bytes": 9}
    found = summarize(records, ["text"], ["model"])["text"]["models"]["model"]
    assert found["bits_per_byte"]["mean"] == pytest.approx(5 / 11)
    assert found["nats_per_token"]["mean"] == pytest.approx(5 * math.log(2) / 6)


def test_tokens_across_the_boundary_are_scored():
    def merging(text):  # "b c" is one token, as a tokenizer may have it
        return encode(text.replace("b c", "b_c"))

    plain = pairs_of(EvalModel("model", encode), TASKS["piqa"], choice("c", "d"), 4, prefix="A b ")
    assert [WORDS[token] for token in plain[0].context] == ["A", " b", " Q:"]
    assert plain[1] == Pair(plain[0].context, tuple(encode(" d")), 4, 1)
    item = Item((("a b", " c d"),))
    pair, = pairs_of(EvalModel("model", merging), TASKS["piqa"], item, 0)
    assert [WORDS[token] for token in pair.continuation] == [" b_c", " d"]
    pair, = pairs_of(EvalModel("model", merging), TASKS["piqa"], item, 0, reference=True)
    assert [WORDS[token] for token in pair.continuation] == [" c", " d"]


def test_reference_bos_before_options():
    model = EvalModel("model", encode, encode_special=lambda text: [0, *encode(text)])
    for name, expected in (("hellaswag", (0, *encode(" v"))), ("siqa", tuple(encode(" v")))):
        pair, = pairs_of(model, TASKS[name], Item((("Q:", " v"),)), 0, reference=True)
        assert pair.continuation == expected and pair.context[0] == 0


def test_long_context_is_cut_from_the_left():
    model = EvalModel("model", encode, max_length=5)
    pair, = pairs_of(model, TASKS["piqa"], Item((("a b c d", " e f"),)), 0)
    assert pair.context == tuple(encode(" c d"))
    with pytest.raises(DataError, match="piqa, item 3, option 0"):
        pairs_of(model, TASKS["piqa"], Item((("a", " b c d e f"),)), 3)
    with pytest.raises(DataError, match="item 3, option 0"):
        pairs_of(model, TASKS["piqa"], Item((("a", ""),)), 3)


@pytest.mark.parametrize("done", [0, 1, 4, 6, 9, 12])
def test_stopped_run_resumes(done):
    calls, models = [], [scripted("a", len), scripted("b", lambda text: -len(text))]
    jobs = [JOB, Job(TASKS["hellaswag"], ITEMS)]
    full = run(jobs, models, chunk_size=2)
    again = run(jobs, models, chunk_size=2, done=full[:done], add=calls.append)
    assert again == full
    assert [record for records in calls for record in records] == full[done:]


def test_missing_capability():
    with pytest.raises(ConfigError, match="mute.*lambada"):
        run([JOB, Job(TASKS["lambada"], [Item(prompt="a", answers=("b",))])], [scripted("mute", len)])


def test_samples_of_an_item():
    asked = []

    def generate(requests, *, temperature, num_steps):
        asked.extend((request.item, request.sample) for request in requests)
        return [f"{request.item + request.sample}" for request in requests]

    items = [Item(prompt="a", answers=("1",)) for _ in range(3)]
    model, task = EvalModel("model", encode, generate=generate), TASKS["mawps"]
    full = run([Job(task, items)], [model], samples=2, temperature=1.0)
    assert asked == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert [record["values"]["last_number"] for record in full] == [0.5, 0.5, 0]
    found = summarize(full, ["mawps"], ["model"])["mawps"]["models"]["model"]
    assert found["hit"]["mean"] == pytest.approx(2 / 3) and found["majority"]["mean"] == pytest.approx(1 / 3)
    for size in (1, 2, 32):
        assert run([Job(task, items)], [model], samples=2, temperature=1.0, done=full[:1], chunk_size=size) == full


@pytest.mark.parametrize(("name", "settings", "named"), [
    ("gsm8k", {"samples": 3}, "temperature"),
    ("gsm8k", {"samples": 0}, "samples"),
    ("gsm8k", {"temperature": -0.1}, "temperature"),
    ("gsm8k", {"temperature": math.nan}, "temperature"),
    ("gsm8k", {"samples": 2, "temperature": 1.0, "reference": True}, "samples"),
    ("mawps", {"reference": True}, "mawps"),
    ("piqa", {"temperature": 0.5}, "piqa"),
    ("text", {"samples": 2, "temperature": 0.5}, "text"),
])
def test_conflicting_settings(name, settings, named):
    with pytest.raises(ConfigError, match=named):
        run([Job(TASKS[name], [Item(prompt="a", answers=("1",))])], [scripted("model", len)], **settings)


def test_markdown_report():
    records = run([JOB], [scripted("a", len)])
    page = markdown_report({"models": ["a"], "settings": {"seed": 3}, "versions": {"jax": "1"},
                            "tasks": summarize(records, ["piqa"], ["a"])})
    assert "| piqa | accuracy | 3 | 66.7 ± 33.3 |" in page and "- seed: 3" in page and "jax 1" in page


@pytest.mark.parametrize(("text", "how", "expected"), [
    ('"Go!" he said.', "sentence", '"Go!"'),
    ("\n one \ntwo", "line", "one"),
    (" 1 + 1\n\n#### 2\n\nQuestion: 3?", "answer", "1 + 1\n\n#### 2"),
    ("It is 2.\nQ: 3?", "answer", "It is 2."),
    ("No Question: at a line's start", "answer", "No Question: at a line's start"),
    (" a\nb ", "all", "a\nb"),
])
def test_truncate(text, how, expected):
    assert truncate(text, how) == expected


def test_extract_answer():
    model = EvalModel("model", list)
    assert extract_answer(TASKS["lambada"], model, Item(), " a\nb", True) == " a\nb"
    assert extract_answer(TASKS["lambada"], model, Item(), " a\nb", False) == "a"


def test_majority_vote_by_the_first_metric():
    item = Item(answers=("18",))
    texts = ["It is 4.", "The answer is 18, and 5", "so 18.0", "4 or 5", "$18", "none"]
    record = judge_generation(TASKS["mawps"], item, texts, texts, False)
    # Last numbers: 4, 5, 18, 5, 18, none. Of 5 and 18 the 5 was seen first.
    assert record["votes"] == ["4.0", "5.0", "18.0", "5.0", "18.0", None]
    assert record["values"] == pytest.approx({"last_number": 2 / 6, "stated_number": 1 / 6, "majority": 0, "hit": 1})
    record = judge_generation(TASKS["mawps"], item, texts[2:], texts[2:], False)
    assert record["values"]["majority"] == 1
    assert record["texts"] == record["predictions"] == texts[2:] and record["answers"] == ["18"]


def test_majority_vote_of_short_answers():
    item = Item(answers=("Eiffel Tower",))
    texts = ["the Eiffel tower!", "Louvre", "", "", "", "Eiffel Tower"]
    record = judge_generation(TASKS["triviaqa"], item, texts, texts, False)
    assert record["votes"] == ["eiffel tower", "louvre", None, None, None, "eiffel tower"]
    assert record["values"]["majority"] == record["values"]["hit"] == 1
    assert record["values"]["exact_match"] == pytest.approx(2 / 6)
    record = judge_generation(TASKS["satmath"], Item(answers=("B",)), ["?", "!"], ["?", "!"], False)
    assert record["values"] == {"chosen_letter": 0, "majority": 0, "hit": 0}


def test_metrics_without_answers_have_no_vote():
    texts = ["He ran.", "She sat."]
    record = judge_generation(TASKS["rocstories"], Item(answers=("He ran.",)), texts, texts, False)
    assert record["values"] == {"rouge1": 0.5, "rouge2": 0.5, "rougeL": 0.5}


def test_executed_programs():
    task, item = TASKS["humaneval_infilling"], Item(tests="check(f)")
    outcomes = [Outcome(False, "NameError"), Outcome(True, "passed"), Outcome(False, "NameError")]
    record = judge_generation(task, item, ["a", "b", "c"], ["a", "b", "c"], False, outcomes)
    assert record["values"] == pytest.approx({"pass_at_1": 1 / 3, "hit": 1})
    assert record["outcomes"] == ["NameError", "passed", "NameError"]
    assert judge_generation(task, item, ["a"], ["a"], False, outcomes[:1]) == {
        "text": "a", "prediction": "a", "outcomes": ["NameError"], "values": {"pass_at_1": 0}}
