"""A pretrained model as an EvalModel, token by token, under both protocols."""

import dataclasses

import numpy as np
import pytest
from scipy.special import log_softmax

from dlm_jax import AttentionMask
from dlm_jax.errors import ConfigError
from dlm_jax.evaluation.eval_model import GenerationRequest
from dlm_jax.evaluation.make_eval_model import make_eval_model
from dlm_jax.evaluation.run import Job, pairs_of, run
from dlm_jax.evaluation.tasks import TASKS
from dlm_jax.sampling import SamplerConfig

SEED, STEPS = 5, 32
ROWS = {"hellaswag": {"activity_label": "Fun", "ctx_a": "A boy", "ctx_b": "ran", "label": 0,
                      "endings": ["to the big tree.", "home."]},
        "winogrande": {"sentence": "Tom saw Sue so _ was happy.", "option1": "Tom", "option2": "Sue", "answer": "2"},
        "piqa": {"goal": "Eat an apple.", "sol1": "With a spoon.", "sol2": "Bite it.", "label": 1}}
TEXTS = {"hellaswag": [("Fun: A boy Ran", "to the big tree."), ("Fun: A boy Ran", "home.")],
         "winogrande": [("Tom saw Sue so ", "Tomwas happy."), ("Tom saw Sue so ", "Suewas happy.")],
         "piqa": [("Question: Eat an apple.\nAnswer: ", " With a spoon."),
                  ("Question: Eat an apple.\nAnswer: ", " Bite it.")]}


def with_diffusion(pretrained, **changes):
    return dataclasses.replace(pretrained, diffusion=dataclasses.replace(pretrained.diffusion, **changes))


def reference_score(lm, prompt, option, uniform):
    """Computes the score of the reference implementation by NumPy."""
    row = np.array([*prompt, *option])
    masked = np.zeros((STEPS, len(row)), bool)
    for step in range(STEPS):
        masked[step, len(prompt):] = uniform[step] < (STEPS - step) / STEPS
    logp = log_softmax(np.asarray(lm.logits(np.where(masked, lm.mask_token_id, row)), np.float64), axis=-1)
    nll = -np.take_along_axis(logp[:, :-1], np.broadcast_to(row[1:, None], (STEPS, len(row) - 1, 1)), axis=-1)[..., 0]
    means = [row_nll[where].mean() if where.any() else 0.0 for row_nll, where in zip(nll, masked[:, 1:], strict=True)]
    return np.mean(means)


@pytest.mark.parametrize("name", ROWS)
def test_reference_score_token_by_token(lm, name):
    task, encode = TASKS[name], lm.tokenizer.encode
    item = task.read(ROWS[name], True)
    eval_model = make_eval_model(lm.pretrained, "model", reference=True, num_samples=STEPS, seed=SEED)
    expected = []
    pairs = pairs_of(eval_model, task, item, 0, reference=True)
    for option, (pair, (prompt, text)) in enumerate(zip(pairs, TEXTS[name], strict=True)):
        assert (list(pair.context), list(pair.continuation)) == (encode(prompt), encode(text))
        uniform = np.random.default_rng([SEED, 0, option]).random((STEPS, len(pair.continuation)))
        expected.append(reference_score(lm, encode(prompt), encode(text), uniform))
    record, = run([Job(task, [item])], [eval_model], reference=True)
    np.testing.assert_allclose(record["scores"], expected, rtol=1e-4)
    assert record["picks"] == [int(np.argmin(expected))]


def test_parent_score_is_the_chain_rule(lm):
    task = TASKS["hellaswag"]
    item = task.read(ROWS["hellaswag"], False)
    parent = make_eval_model(lm.pretrained, "parent", autoregressive=True)
    model = make_eval_model(lm.pretrained, "model")
    assert pairs_of(parent, task, item, 0) == pairs_of(model, task, item, 0)
    record, = run([Job(task, [item])], [parent])
    for (context, continuation), found in zip(item.options, record["scores"], strict=True):
        full = lm.tokenizer.encode(context + continuation)
        row = [lm.pretrained.bos_token_id, *full]
        logp = log_softmax(np.asarray(lm.logits(np.array([row]), AttentionMask.causal()), np.float64)[0], axis=-1)
        first = len(row) - len(full) + len(lm.tokenizer.encode(context))
        assert found == pytest.approx(-sum(logp[n - 1, row[n]] for n in range(first, len(row))), rel=1e-4)


def test_generation_follows_the_sampler(lm):
    request, prompt = GenerationRequest("Tom saw a", "", range(8, 9), 0), "Tom saw a"
    for sampler in (None, SamplerConfig("threshold", threshold=0.3, block_length=2)):
        model = make_eval_model(lm.pretrained, "model", sampler=sampler)
        found, = model.generate([request], temperature=0.0, num_steps=None)
        how = {} if sampler is None else dataclasses.asdict(sampler)
        expected, = lm.generate([prompt], max_new_tokens=8, **how | {"temperature": 0.0})
        assert found == expected.removeprefix(prompt)


def test_refusals(lm):
    without = with_diffusion(lm.pretrained, mask_token_id=None)
    with pytest.raises(ConfigError, match="mask_token"):
        make_eval_model(without, "model")
    make_eval_model(without, "parent", autoregressive=True)
    with pytest.raises(ConfigError, match="tokenizer"):
        make_eval_model(dataclasses.replace(lm.pretrained, tokenizer=None), "model")
    with pytest.raises(ConfigError, match="shift"):
        make_eval_model(with_diffusion(lm.pretrained, shift=False), "parent", autoregressive=True)
    with pytest.raises(ConfigError, match="num_samples"):
        make_eval_model(lm.pretrained, "model", num_samples=0)
