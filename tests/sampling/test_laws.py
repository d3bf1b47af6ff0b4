"""Every policy and setting against its enumerated law; autoregressive decoding against the chain rule."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_jax.attention import AttentionMask
from dlm_jax.models import ModelConfig
from tests.sampling.enumerated import JointDistribution, LogitsModel, ReferenceSampler, assert_follows, truncated
from tests.sampling.tiny_models import random_model, run_sampler

ROWS = 10_000
THREE, FOUR = JointDistribution(vocab=3, length=3), JointDistribution(vocab=2, length=4)
LEFT = np.cos(np.pi / 2 * np.arange(3) / 3)  # masked before each of 3 steps of the cosine schedule


pytestmark = pytest.mark.usefixtures("optimized_program")


def everywhere(joint, *numbers):
    return [(range(joint.length), numbers)]


def sample_outcomes(joint, given=None, context=0, rows=ROWS, **settings):
    """Returns the outcomes of equal rows, without the context token."""
    given = given or (None,) * joint.length
    row = [context, *(0 if token is None else token for token in given)]
    fixed = [True, *(token is not None for token in given)]
    network = LogitsModel(joint.logits, settings.get("shift", True), joint.mask + 1)
    tokens, fixed = np.tile(row, (rows, 1)), np.tile(fixed, (rows, 1))
    return run_sampler(network, tokens, fixed, mask=joint.mask, **settings).tokens[:, 1:]


CASES = {
    "random in blocks": (FOUR, "random", [((0, 1), (1 / 2, 1)), ((2, 3), (1 / 2, 1))], dict(
        policy="random", num_steps=4, block_length=2, temperature=0.7, top_p=0.8, shift=False)),
    "random, cosine": (THREE, "random", everywhere(THREE, *(1 - LEFT[1:] / LEFT[:-1]), 1), dict(
        policy="random", num_steps=3, step_schedule="cosine")),
    "exact in blocks": (THREE, "exact", [((0, 1), (2,)), ((2,), (1,))], dict(
        policy="random_exact", num_steps=2, block_length=2, shift=False, top_k=2)),
    "exact, cosine, remasking in blocks": (FOUR, "exact", [((0, 1, 2), (1, 2, 3)), ((3,), (1,))], dict(
        policy="random_exact", num_steps=9, step_schedule="cosine", remask=0.5, block_length=3)),
    "confidence, cosine, truncated": (FOUR, "confidence", everywhere(FOUR, 1, 2, 4), dict(
        policy="confidence", num_steps=3, step_schedule="cosine", top_p=0.9, shift=False)),
    "confidence in blocks": (FOUR, "confidence", [((0, 1), (2,)), ((2, 3), (1, 2))], dict(
        policy="confidence", num_steps=3, block_length=2, temperature=0.8)),
    "confidence, remasking": (THREE, "confidence", everywhere(THREE, 1, 2, 3), dict(
        policy="confidence", num_steps=64, remask=0.4, top_k=2)),
    # For these distributions margin, entropy, probability and odds choose different positions.
    "margin in blocks": (JointDistribution(3, 4, 4), "margin", [((0, 1, 2), (2, 3)), ((3,), (1,))], dict(
        policy="margin", num_steps=3, block_length=3, shift=False)),
    "entropy": (JointDistribution(3, 4, 17), "entropy", [(range(4), (2, 3, 4))], dict(
        policy="entropy", num_steps=3, temperature=1.2)),
    "threshold in steps": (FOUR, "confidence", everywhere(FOUR, 2, 4), dict(
        policy="threshold", threshold=0.7, num_steps=2, shift=False)),
    "threshold in blocks": (FOUR, "confidence", [((0, 1), (1, 2)), ((2, 3), (1, 2))], dict(
        policy="threshold", threshold=0.6, block_length=2)),
    "guidance": (FOUR, "confidence", [((0, 2, 3), (2, 3))], dict(
        policy="confidence", num_steps=2, cfg_scale=0.8, given=(None, 1, None, None), temperature=1.4, shift=False)),
    "repetition and end of text": (THREE, "confidence", [((0, 2), (1, 2))], dict(
        policy="confidence", context=1, given=(None, 0, None), repetition_penalty=1.7, eos=2, eos_penalty=0.6)),
}
NOT_IN_THE_LAW = ("policy", "num_steps", "step_schedule", "block_length", "shift", "repetition_penalty")


@pytest.mark.parametrize("case", CASES.items(), ids=lambda case: case[0])
def test_policy_follows_enumerated_law(case):
    joint, policy, blocks, settings = case[1]
    law_settings = {name: value for name, value in settings.items() if name not in NOT_IN_THE_LAW}
    law = ReferenceSampler(joint, policy, blocks, penalty=settings.get("repetition_penalty", 1.0), **law_settings).law()
    assert_follows(law, sample_outcomes(joint, **settings))


@pytest.mark.parametrize(("settings", "given"), [
    (dict(policy="random", num_steps=3000), None),
    (dict(policy="first_hitting", block_length=2), (None, 1, None)),
], ids=["random", "first_hitting in blocks"])
def test_one_random_token_per_step_gives_joint_law(settings, given):
    assert_follows(THREE.law(given or ()), sample_outcomes(THREE, given, **settings))


@pytest.mark.parametrize("settings", [
    dict(policy="random", num_steps=3000, shift=False),
    dict(policy="confidence", block_length=1)], ids=["random", "one by one from the left"])
def test_stop_at_eos_keeps_law_before_eos(settings):
    def ended(row):
        end = row.index(0) + 1 if 0 in row else len(row)
        return (*row[:end], *[0] * (len(row) - end))

    law = dict.fromkeys(THREE.law(), 0.0)
    for row, p in THREE.law().items():
        law[ended(row)] += p
    found = sample_outcomes(THREE, eos=0, stop=True, **settings)
    assert_follows(law, [ended(row) for row in found.tolist()])


def test_reference_sampler_agrees_with_chain_rule():
    """One per step, the reference gives the joint law; all at once, the product of marginals."""
    hazards = 1 / np.arange(100, 0, -1)
    for policy, numbers, tolerance in (("exact", (1, 2, 3), 1e-12), ("random", hazards, 0.02)):
        law = ReferenceSampler(THREE, policy, everywhere(THREE, *numbers)).law()
        assert max(abs(law[row] - p) for row, p in THREE.law().items()) < tolerance
    marginals = THREE.marginals((None,) * 3)
    for policy in ("exact", "confidence"):
        for row, p in ReferenceSampler(THREE, policy, everywhere(THREE, 3)).law().items():
            np.testing.assert_allclose(p, np.prod([marginals[n][token] for n, token in enumerate(row)]), rtol=1e-9)


AR_ROWS, AR_VOCAB, AR_NEW = 5_000, 4, 3
AR_PROMPTS = [[1], [3, 0, 0, 1]]


def ar_model(kind):
    details = dict(norm="layer", positions="learned", gated_mlp=False) if kind == "gpt2" else {}
    return random_model(ModelConfig(kind, vocab_size=AR_VOCAB, hidden_size=8, num_layers=2, num_heads=2, num_kv_heads=2,
                                    head_dim=4, mlp_size=16, max_length=8, **details), scale=0.5)


def chain_law(model, prompt, mask=None, repetition_penalty=1.0, eos=None, stop=False, **choice):
    """Returns the probability of every continuation by AR_NEW tokens; with `stop`, up to its first end of text."""
    prefixes = [[*prompt, *new] for size in range(AR_NEW) for new in itertools.product(range(AR_VOCAB), repeat=size)]
    padded = np.array([prefix + [0] * (8 - len(prefix)) for prefix in prefixes])
    logits_of = jax.jit(lambda model, tokens: model(tokens, AttentionMask.causal()))(model, jnp.asarray(padded))
    step = {}
    for prefix, rows in zip(prefixes, np.asarray(logits_of, np.float64), strict=True):
        logits = rows[len(prefix) - 1]
        for token in set(prefix):
            logits[token] *= repetition_penalty if logits[token] < 0 else 1 / repetition_penalty
        if mask is not None:
            logits[mask] = -np.inf
        step[tuple(prefix)] = truncated(np.exp(logits), **choice)
    law = {}
    for new in itertools.product(range(AR_VOCAB), repeat=AR_NEW):
        p = np.prod([step[(*prompt, *new[:n])][token] for n, token in enumerate(new)])
        end = new.index(eos) + 1 if stop and eos in new else AR_NEW
        stopped = new[:end] + (eos,) * (AR_NEW - end)
        law[stopped] = law.get(stopped, 0.0) + p
    return law


@pytest.mark.parametrize(("kind", "settings"), [
    ("gpt2", dict(mask=3, repetition_penalty=1.6, temperature=1.3, top_p=0.9)),
    ("llama", dict(mask=None, eos=1, stop=True, top_k=2)),
], ids=["choice", "end of text"])
def test_autoregressive_follows_chain_rule(kind, settings):
    model, tokens = ar_model(kind), np.zeros((2 * AR_ROWS, 8), int)
    lengths = np.array([len(AR_PROMPTS[row % 2]) for row in range(2 * AR_ROWS)])
    for start, prompt in enumerate(AR_PROMPTS):
        tokens[start::2, : len(prompt)] = prompt
    out = run_sampler(model, tokens, np.arange(8) < lengths[:, None], lengths + AR_NEW, policy="autoregressive",
                      **settings)
    for start, prompt in enumerate(AR_PROMPTS):
        new = out.tokens[start::2, len(prompt) : len(prompt) + AR_NEW]
        assert_follows(chain_law(model, prompt, **settings), new)
        steps = out.steps[start::2]
        ended = new == (settings["eos"] if settings.get("stop") else -1)
        np.testing.assert_array_equal(steps, np.where(ended.any(axis=1), ended.argmax(axis=1) + 1, AR_NEW))
