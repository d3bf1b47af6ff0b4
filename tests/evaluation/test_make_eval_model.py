"""A pretrained model as an EvalModel, token by token, under both protocols."""

import dataclasses

import numpy as np
import pytest
from scipy.special import log_softmax

from dlm_jax import AttentionMask
from dlm_jax.errors import ConfigError
from dlm_jax.evaluation.eval_model import GenerationRequest, Pair, make_pair
from dlm_jax.evaluation.make_eval_model import make_eval_model
from dlm_jax.sampling import SamplerConfig

SEED, STEPS = 5, 32
CHOICES = [("Fun: A boy Ran", "to the big tree."), ("Fun: A boy Ran", "home."), ("Tom saw Sue so ", "Tomwas happy.")]


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


def test_reference_score_token_by_token(lm):
    eval_model = make_eval_model(lm.pretrained, "model", reference=True, num_samples=STEPS, seed=SEED)
    pairs, expected = [], []
    for option, (prompt, text) in enumerate(CHOICES):
        pairs.append(Pair(tuple(eval_model.encode_special(prompt)), tuple(eval_model.encode(text)), 3, option))
        uniform = np.random.default_rng([SEED, 3, option]).random((STEPS, len(pairs[-1].continuation)))
        expected.append(reference_score(lm, lm.tokenizer.encode(prompt), lm.tokenizer.encode(text), uniform))
    np.testing.assert_allclose(np.mean(eval_model.score(pairs), axis=1), expected, rtol=1e-4)


def test_parent_score_is_the_chain_rule(lm):
    """Context and continuation are tokenized together, and BOS stands at position 0."""
    parent = make_eval_model(lm.pretrained, "parent", autoregressive=True)
    pairs = [make_pair(parent, context, " " + option, 0, 0, "") for context, option in CHOICES]
    for (context, option), found in zip(CHOICES, parent.score(pairs), strict=True):
        full = lm.tokenizer.encode(f"{context} {option}")
        row = [lm.pretrained.bos_token_id, *full]
        logp = log_softmax(np.asarray(lm.logits(np.array([row]), AttentionMask.causal()), np.float64)[0], axis=-1)
        alone = lm.tokenizer.encode(context)
        shared = next((n for n, (a, b) in enumerate(zip(alone, full, strict=False)) if a != b), len(alone))
        assert found == pytest.approx(-sum(logp[n - 1, row[n]] for n in range(1 + shared, len(row))), rel=1e-4)


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
