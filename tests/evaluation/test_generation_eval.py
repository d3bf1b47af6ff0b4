"""Held-out examples answered during training: by the run's own parameters, as the finished model answers them."""

import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest
from flax import nnx
from transformers import AutoTokenizer

from dlm_jax import DiffusionLM
from dlm_jax.checkpoints import load_pretrained
from dlm_jax.cli.train import extra_hooks
from dlm_jax.data.config import ExampleConfig
from dlm_jax.data.corpus import load_rows
from dlm_jax.data.prompts import PromptFormat
from dlm_jax.errors import ConfigError
from dlm_jax.evaluation.generation_eval import GenerationEval, Question, judge
from dlm_jax.parallel import MeshConfig, make_mesh, param_shardings
from dlm_jax.sampling import SamplerConfig
from dlm_jax.training import read_records, train
from tests.training.conftest import LETTERS, base, changed, config, corpus, pretrained  # noqa: F401

ANSWER = "cafe"


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    """Every prompt of three letters; all have one answer, which is soon learned."""
    path = tmp_path_factory.mktemp("examples") / "pairs.jsonl"
    prompts = ["".join(letters) for letters in itertools.product(LETTERS[:6], repeat=3)]
    path.write_text("\n".join(json.dumps({"prompt": prompt, "response": ANSWER}) for prompt in prompts))
    return path


@pytest.fixture
def tuning(config, examples):  # noqa: F811
    data = dataclasses.replace(
        config.data, train=(str(examples),), document_separator="", validation_fraction=0.3,
        examples=ExampleConfig("prompt_response", separator="h", train_on_padding=True))
    validation = dataclasses.replace(config.validation, every=10, num_generations=12, generation_steps=3)
    optimizer = dataclasses.replace(config.optimizer, learning_rate=3e-2, ema_decay=0.0, accumulate_steps=1)
    objective = dataclasses.replace(config.objective, anneal_steps=0)
    checkpoint = dataclasses.replace(config.checkpoint, every=20)
    return dataclasses.replace(config, checkpoint=checkpoint, data=data, validation=validation, optimizer=optimizer,
                               objective=objective)


def run(settings, workdir):
    return train(settings, workdir, extra_hooks(settings))


def test_answers_become_right_and_match_the_trained_model(tuning, tmp_path):
    summary = run(tuning, tmp_path / "run")
    first, *_, last = records = read_records(tmp_path / "run", "generation")
    assert [record["step"] for record in records] == [0, 10, 20]
    assert first["exact_match"] == 0 and last["exact_match"] > 0.9 and last["text"] == ANSWER
    assert summary["generation"] == last
    assert run(tuning, tmp_path / "run")["generation"] == last  # of the finished run

    lm = DiffusionLM.from_pretrained(tmp_path / "run@20")
    assert lm.respond(["abc", "fed"], max_new_tokens=11, temperature=0.0, num_steps=3) == [ANSWER, ANSWER]


def test_answers_are_the_same_on_every_mesh(tuning, pretrained, tmp_path):  # noqa: F811
    model = load_pretrained(pretrained, mask_token="<mask>")
    _, held_out = load_rows(tuning.data, model.tokenizer, vocab_size=model.model.config.vocab_size, cache_dir=tmp_path)
    params = nnx.state(model.model)
    found = []
    for mesh_config in (tuning.mesh, MeshConfig(context=8)):
        mesh = make_mesh(mesh_config)
        sampler = SamplerConfig("confidence", temperature=0.0, num_steps=3)
        evaluate = GenerationEval(model, held_out, mesh, tuning.data, num_examples=12, sampler=sampler)
        found.append(evaluate(jax.device_put(params, param_shardings(params, mesh))))
    assert found[0] == found[1]


def test_held_out_examples_are_needed(tuning, tmp_path):
    with pytest.raises(ConfigError, match="validation.num_generations"):
        run(changed(tuning, "data.validation_fraction", 0.0), tmp_path)


def test_judge(base):  # noqa: F811
    tokenizer = AutoTokenizer.from_pretrained(base)
    texts = ["<<1+1=2>> #### 2", "#### 2", "<<1+1=3>> #### 3", "<<1+1=2>> #### 2 #", "two"]
    values = judge(texts, [Question((0,), texts[0])] * 5, PromptFormat(tokenizer, ExampleConfig("gsm8k_symbolic"), 16))
    assert np.array([list(value.values()) for value in values]).tolist() == [
        [1, 1, 1], [0, 1, 1], [0, 0, 1], [0, 1, 0], [0, 0, 0]]
    near, = judge(["a b c"], [Question((0,), "a b d")], PromptFormat(tokenizer, ExampleConfig("prompt_response"), 16))
    assert near == {"exact_match": 0.0, "rougeL": pytest.approx(2 / 3)}
