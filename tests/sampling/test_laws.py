"""Every policy and setting against its law, enumerated step by step."""

import numpy as np
import pytest

from tests.sampling.tools import run
from tests.sampling.toys import Joint, Reference, Toy, assert_follows

ROWS = 20_000
OPTIMIZATION_LEVEL = 1
THREE, FOUR = Joint(vocab=3, length=3), Joint(vocab=2, length=4)
LEFT = np.cos(np.pi / 2 * np.arange(3) / 3)  # of the cosine grid, before each of 3 steps


def everywhere(joint, *numbers):
    return [(range(joint.length), numbers)]


def draw_tokens(joint, given=None, context=0, rows=ROWS, **settings):
    """What is drawn for `rows` alike, the context token left out."""
    given = given or (None,) * joint.length
    row = [context, *(0 if token is None else token for token in given)]
    fixed = [True, *(token is not None for token in given)]
    network = Toy(joint.logits, settings.get("shift", True), joint.mask + 1)
    return run(network, np.tile(row, (rows, 1)), np.tile(fixed, (rows, 1)), mask=joint.mask, **settings).tokens[:, 1:]


CASES = {
    "random in blocks": (FOUR, "random", [((0, 1), (1 / 2, 1)), ((2, 3), (1 / 2, 1))], dict(
        policy="random", num_steps=4, block_length=2)),
    "random, truncated": (THREE, "random", everywhere(THREE, 1 / 3, 1 / 2, 1), dict(
        policy="random", num_steps=3, temperature=0.7, top_p=0.8, shift=False)),
    "random, cosine": (THREE, "random", everywhere(THREE, *(1 - LEFT[1:] / LEFT[:-1]), 1), dict(
        policy="random", num_steps=3, step_schedule="cosine")),
    "exact": (THREE, "exact", everywhere(THREE, 1, 3), dict(policy="random_exact", num_steps=2, top_k=2)),
    "exact in blocks": (THREE, "exact", [((0, 1), (2,)), ((2,), (1,))], dict(
        policy="random_exact", num_steps=2, block_length=2, shift=False)),
    "exact, cosine, remasking in blocks": (FOUR, "exact", [((0, 1, 2), (1, 2, 3)), ((3,), (1,))], dict(
        policy="random_exact", num_steps=9, step_schedule="cosine", remask=0.5, block_length=3)),
    "confidence": (THREE, "confidence", everywhere(THREE, 1, 3), dict(policy="confidence", num_steps=2, shift=False)),
    "confidence, cosine, truncated": (FOUR, "confidence", everywhere(FOUR, 1, 2, 4), dict(
        policy="confidence", num_steps=3, step_schedule="cosine", top_p=0.9)),
    "confidence in blocks": (FOUR, "confidence", [((0, 1), (2,)), ((2, 3), (1, 2))], dict(
        policy="confidence", num_steps=3, block_length=2, temperature=0.8)),
    "confidence, remasking": (THREE, "confidence", everywhere(THREE, 1, 2, 3), dict(
        policy="confidence", num_steps=64, remask=0.4, top_k=2)),
    # On these, margin, entropy, the largest probability and the largest odds choose differently.
    "margin": (Joint(3, 4, 8), "margin", [(range(4), (1, 2, 4))], dict(policy="margin", num_steps=3, top_p=0.95)),
    "margin in blocks": (Joint(3, 4, 4), "margin", [((0, 1, 2), (1, 3)), ((3,), (1,))], dict(
        policy="margin", num_steps=3, block_length=3, shift=False)),
    "entropy": (Joint(3, 4, 17), "entropy", [(range(4), (1, 2, 4))], dict(
        policy="entropy", num_steps=3, temperature=1.2)),
    "entropy in blocks": (Joint(3, 4, 2), "entropy", [((0, 1, 2), (1, 3)), ((3,), (1,))], dict(
        policy="entropy", num_steps=3, block_length=3)),
    "threshold": (THREE, "confidence", everywhere(THREE, 1, 2, 3), dict(policy="threshold", threshold=0.5)),
    "threshold in steps": (FOUR, "confidence", everywhere(FOUR, 2, 4), dict(
        policy="threshold", threshold=0.7, num_steps=2, shift=False)),
    "threshold in blocks": (FOUR, "confidence", [((0, 1), (1, 2)), ((2, 3), (1, 2))], dict(
        policy="threshold", threshold=0.6, block_length=2)),
    "guidance": (FOUR, "confidence", [((0, 2, 3), (1, 3))], dict(
        policy="confidence", num_steps=2, cfg_scale=0.8, given=(None, 1, None, None))),
    "guidance by chance": (THREE, "exact", [((0, 2), (1, 2))], dict(
        policy="random_exact", cfg_scale=1.5, given=(None, 2, None), temperature=1.4, shift=False)),
    "repetition": (THREE, "confidence", everywhere(THREE, 1, 2, 3), dict(
        policy="confidence", context=1, repetition_penalty=1.7)),
    "repetition and end of text": (THREE, "exact", [((0, 2), (1, 2))], dict(
        policy="random_exact", context=3, given=(None, 0, None), repetition_penalty=1.4, eos=2, eos_penalty=0.6)),
    "no end of text": (THREE, "confidence", everywhere(THREE, 1, 3), dict(
        policy="confidence", num_steps=2, eos=0, eos_penalty=np.inf)),
}
NOT_IN_THE_LAW = ("policy", "num_steps", "step_schedule", "block_length", "shift", "repetition_penalty")


@pytest.mark.parametrize("case", CASES.items(), ids=lambda case: case[0])
def test_samples_follow_the_enumerated_law(case):
    joint, policy, blocks, settings = case[1]
    told = {name: value for name, value in settings.items() if name not in NOT_IN_THE_LAW}
    law = Reference(joint, policy, blocks, penalty=settings.get("repetition_penalty", 1.0), **told).law()
    assert_follows(law, draw_tokens(joint, **settings))


@pytest.mark.parametrize(("settings", "given"), [
    (dict(policy="random", num_steps=3000), None),
    (dict(policy="random_exact", num_steps=64, shift=False), None),
    (dict(policy="first_hitting", block_length=2), (None, 1, None)),
], ids=["random", "random_exact", "first_hitting in blocks"])
def test_one_token_at_a_time_by_chance_gives_the_joint_law(settings, given):
    assert_follows(THREE.law(given or ()), draw_tokens(THREE, given, **settings))


@pytest.mark.parametrize("settings", [
    dict(policy="random", num_steps=3000, shift=False), dict(policy="first_hitting"),
    dict(policy="confidence", block_length=1)], ids=["random", "first_hitting", "one by one from the left"])
def test_what_precedes_an_end_of_text_has_the_law_it_has_without_stopping(settings):
    def ended(row):
        end = row.index(0) + 1 if 0 in row else len(row)
        return (*row[:end], *[0] * (len(row) - end))

    law = dict.fromkeys(THREE.law(), 0.0)
    for row, p in THREE.law().items():
        law[ended(row)] += p
    found = draw_tokens(THREE, eos=0, stop=True, **settings)
    assert_follows(law, [ended(row) for row in found.tolist()])


def test_the_reference_itself_agrees_with_the_chain_rule():
    """One at a time, the references' two ways of chance give the joint law; all at once, the product of marginals."""
    hazards = 1 / np.arange(400, 0, -1)
    for policy, numbers, tolerance in (("exact", (1, 2, 3), 1e-12), ("random", hazards, 0.01)):
        law = Reference(THREE, policy, everywhere(THREE, *numbers)).law()
        assert max(abs(law[row] - p) for row, p in THREE.law().items()) < tolerance
    marginals = THREE.marginals((None,) * 3)
    for policy in ("exact", "confidence"):
        for row, p in Reference(THREE, policy, everywhere(THREE, 3)).law().items():
            np.testing.assert_allclose(p, np.prod([marginals[n][token] for n, token in enumerate(row)]), rtol=1e-9)
