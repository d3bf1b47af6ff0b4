"""Held-out examples answered during training: by the run's own parameters, as anyone would ask the finished run."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
from transformers import AutoTokenizer

from dlm_jax import DiffusionLM
from dlm_jax.data.config import ExampleConfig
from dlm_jax.data.prompts import PromptFormat
from dlm_jax.errors import ConfigError
from dlm_jax.evaluation.answers import Question, judge
from dlm_jax.parallel import MeshConfig
from dlm_jax.training.loop import train
from dlm_jax.training.metrics import read_records
from tests.training.conftest import LETTERS, changed

ANSWER = "cafe"


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    """Every prompt of three letters; all have one answer, which is soon learnt."""
    path = tmp_path_factory.mktemp("examples") / "pairs.jsonl"
    prompts = ["".join(letters) for letters in itertools.product(LETTERS[:6], repeat=3)]
    path.write_text("\n".join(json.dumps({"prompt": prompt, "response": ANSWER}) for prompt in prompts))
    return path


@pytest.fixture
def tuning(config, examples):
    data = dataclasses.replace(
        config.data, train=(str(examples),), document_separator="", validation_fraction=0.3,
        examples=ExampleConfig("prompt_response", separator="h", train_on_padding=True))
    validation = dataclasses.replace(config.validation, every=10, generation_eval=12, generation_steps=3)
    optimizer = dataclasses.replace(config.optimizer, learning_rate=3e-2, ema_decay=0.0)
    objective = dataclasses.replace(config.objective, anneal_steps=0)
    checkpoint = dataclasses.replace(config.checkpoint, every=20)
    return dataclasses.replace(config, checkpoint=checkpoint, data=data, validation=validation, optimizer=optimizer,
                               objective=objective)


@pytest.mark.parametrize("objective", ["diffusion", "autoregressive"])
def test_answers_are_those_of_the_finished_run_and_become_right(tuning, tmp_path, objective):
    summary = train(changed(tuning, "objective.name", objective), tmp_path / "run")
    first, *_, last = records = read_records(tmp_path / "run", "answers")
    assert [record["step"] for record in records] == [0, 10, 20]
    assert first["exact_match"] == 0 and last["exact_match"] > 0.9 and last["text"] == ANSWER
    assert summary["answers"]["exact_match"] == last["exact_match"]

    lm = DiffusionLM.from_pretrained(tmp_path / "run@20")
    settings = {"num_steps": 3} if objective == "diffusion" else {"policy": "autoregressive"}
    assert lm.respond(["abc", "fed"], max_new_tokens=11, temperature=0.0, **settings) == [ANSWER, ANSWER]


def test_the_mesh_changes_no_answer(tuning, tmp_path):
    """Half-learnt, so that answers differ from each other."""
    found = []
    for name, mesh in (("spread", tuning.mesh), ("context", MeshConfig(context=8))):
        run = dataclasses.replace(tuning, mesh=mesh, num_steps=3)
        train(run, tmp_path / name)
        found.append(read_records(tmp_path / name, "answers")[-1])
    assert found[0] == found[1]


def test_a_run_taken_up_again_keeps_its_answers_in_the_summary(tuning, tmp_path):
    run = dataclasses.replace(tuning, num_steps=2)
    answers = train(run, tmp_path)["answers"]
    assert answers["step"] == 2
    assert train(run, tmp_path)["answers"].items() >= answers.items()


@pytest.mark.parametrize("key, value, message", [
    ("data.examples.format", "none", "validation.generation_eval needs examples with prompts"),
    ("validation.every", 0, "validation.generation_eval needs examples with prompts"),
    ("validation.generation_eval", -1, "must not be negative"),
    ("validation.generation_steps", 0, "validation.generation_steps at least 1"),
    ("data.validation_fraction", 0.0, "validation.generation_eval needs held-out examples"),
])
def test_what_cannot_be_answered_is_refused(tuning, tmp_path, key, value, message):
    with pytest.raises(ConfigError, match=message):
        train(changed(tuning, key, value), tmp_path)


def test_how_answers_are_judged(base):
    tokenizer = AutoTokenizer.from_pretrained(base)
    prompt_format = PromptFormat(tokenizer, ExampleConfig("gsm8k_symbolic"), 16)
    texts = ["<<1+1=2>> #### 2", "#### 2", "<<1+1=3>> #### 3", "<<1+1=2>> #### 2 #", "two"]
    values = judge(texts, [Question((0,), texts[0])] * 5, prompt_format)
    assert np.array([list(value.values()) for value in values]).tolist() == [
        [1, 1, 1], [0, 1, 1], [0, 0, 1], [0, 0, 0], [0, 0, 0]]
    assert list(values[0]) == ["exact_match", "marked_number", "in_form"]
    near, = judge(["a b c"], [Question((0,), "a b d")], PromptFormat(tokenizer, ExampleConfig("prompt_response"), 16))
    assert near == {"exact_match": 0.0, "rougeL": pytest.approx(2 / 3)}
