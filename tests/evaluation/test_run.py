"""Runs of a model beside its parent: values by hand, paired differences, Monte Carlo errors and records."""

import dataclasses
import json
import math

import numpy as np
import pytest

from dlm_jax.evaluation.make_eval_model import make_eval_model
from dlm_jax.evaluation.run import evaluate
from dlm_jax.evaluation.task_loading import load_tasks
from tests.evaluation.lm_eval_tasks import CHOICES, TEXTS, Scripted

pytestmark = pytest.mark.usefixtures("offline")


@pytest.fixture
def tasks(harness_folder):
    return lambda *names: load_tasks(names, include_path=str(harness_folder))


def named(model, name):
    return dataclasses.replace(model.eval_model, name=name)


def test_model_and_parent_by_hand(tasks):
    """The first prefers short options, the second long ones."""
    parent = Scripted()
    parent.cost = lambda text: -len(text)
    found = evaluate(tasks("choice", "text"), [named(Scripted(), "model"), named(parent, "parent")])
    choice = found.tasks["choice"]
    assert choice["items"] == 3 and set(choice["metrics"]) == {"acc", "acc_bytes"}
    means = choice["metrics"]["acc"]["models"]
    assert means["model"]["mean"] == pytest.approx(2 / 3) and means["model"]["monte_carlo_error"] is None
    assert means["parent"]["mean"] == pytest.approx(1 / 3)
    difference = choice["metrics"]["acc"]["difference"]  # 1, -1, 1
    assert difference["mean"] == pytest.approx(1 / 3)
    assert difference["standard_error"] == pytest.approx(((2 * (2 / 3) ** 2 + (4 / 3) ** 2) / 2 / 3) ** 0.5)
    assert difference["low"] == -1 and difference["high"] == 1
    bits = found.tasks["text"]["metrics"]["bits_per_byte"]
    sizes = [len(row["text"].encode()) for row in TEXTS]
    nats = sum(Scripted.cost(row["text"]) for row in TEXTS)
    assert bits["models"]["model"]["mean"] == pytest.approx(nats / sum(sizes) / math.log(2))
    assert bits["difference"]["mean"] == pytest.approx((nats + sum(sizes)) / sum(sizes) / math.log(2))
    records = [record for record in found.records if record["task"] == "choice"]
    assert [(record["model"], record["doc_id"]) for record in records] == [
        (name, n) for name in ("model", "parent") for n in range(3)]
    assert records[0]["arguments"][0] == [CHOICES[0]["q"], " ran."] and records[0]["values"]["acc"] == 1.0
    assert json.loads(json.dumps(found.records)) == found.records


def test_monte_carlo_error_of_a_choice(tasks):
    """One half decides by length, the other against it, so the masks decide every item."""
    model = Scripted()

    def score(pairs):
        scores = np.array(model.score(pairs))
        return np.stack([scores, 10 - 1.5 * scores], axis=1)

    found = evaluate(tasks("choice"), [dataclasses.replace(model.eval_model, score=score)])
    mean = found.tasks["choice"]["metrics"]["acc"]["models"]["scripted"]
    assert mean["monte_carlo_error"] == pytest.approx((1 / 3) ** 0.5 / 2)  # every item differs by 1


def test_bounds_have_errors_and_likelihoods_have_none(tasks, lm):
    models = [make_eval_model(lm.pretrained, "diffusion", num_samples=4),
              make_eval_model(lm.pretrained, "parent", autoregressive=True)]
    metrics = evaluate(tasks("last_word", "text"), models).tasks["text"]["metrics"]["bits_per_byte"]
    assert metrics["models"]["diffusion"]["monte_carlo_error"] > 0
    assert metrics["models"]["parent"]["monte_carlo_error"] is None
    more = make_eval_model(lm.pretrained, "diffusion", num_samples=64)
    found = evaluate(tasks("text"), [more]).tasks["text"]["metrics"]["bits_per_byte"]["models"]["diffusion"]
    assert found["monte_carlo_error"] < metrics["models"]["diffusion"]["monte_carlo_error"]


def test_stopped_runs_lose_no_item(tasks):
    class Stopped(RuntimeError):
        pass

    def stored(limit):
        known = {}

        def store(name, answers):
            known.setdefault(name, {}).update(answers)
            if limit and sum(map(len, known.values())) > limit:
                raise Stopped

        return known, store

    models = [named(Scripted(), "model"), named(Scripted(), "parent")]
    whole = evaluate(tasks("choice", "last_word"), models)
    for limit in (1, 7, 9):
        known, store = stored(limit)
        with pytest.raises(Stopped):
            evaluate(tasks("choice", "last_word"), models, store=store)
        again = evaluate(tasks("choice", "last_word"), models, known=json.loads(json.dumps(known)))
        assert again.records == whole.records
        for task, expected in whole.tasks.items():
            assert again.tasks[task]["metrics"] == expected["metrics"]
