"""Steps: how many, what each reveals, when a row is done; and what is refused before the first."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dlm_jax.checkpoints.hf_import import aligned_empty
from dlm_jax.errors import ConfigError
from dlm_jax.sampling import SamplerConfig, SamplingSpec, sample, stream
from tests.sampling.tools import MASK, keys_of, problem, run, tiny
from tests.sampling.toys import Toy

VOCAB, LENGTH = 31, 24  # of the toys here, whose mask is the last of the vocabulary


def masked_count(tokens):
    """Predicts at each position how many masks the row still holds, so that the output tells when it was revealed."""
    count = (tokens == VOCAB - 1).sum(axis=1)
    return jnp.broadcast_to(10 * jax.nn.one_hot(count, VOCAB)[:, None], (*tokens.shape, VOCAB))


def ending(tokens):
    """Is sure of an end of text (token 0) at the position that token 0 of the row names, less so of 5 elsewhere."""
    here = jnp.arange(tokens.shape[1]) == tokens[:, :1]
    return jnp.where(here[..., None], 12 * jax.nn.one_hot(0, VOCAB), 8 * jax.nn.one_hot(5, VOCAB))


def counting(number=20, **config):
    """How many tokens of a row of `number` gaps were revealed by the 1st, 2nd, ... forward pass of a run; its steps.

    Another row has but 4 gaps.
    """
    tokens, fixed = np.zeros((2, LENGTH), int), np.ones((2, LENGTH), bool)
    fixed[0, 2 : 2 + number] = False
    fixed[1, 5:9] = False
    out = run(Toy(masked_count), tokens, fixed, mask=VOCAB - 1, temperature=0.0, **config)
    left = np.sort(np.unique(out.tokens[0, 2 : 2 + number]))[::-1]
    counts = [int((out.tokens[0] == masks).sum()) for masks in left]
    np.testing.assert_array_equal(left, number - np.cumsum([0, *counts[:-1]]))
    assert out.steps[0] == len(counts)
    assert out.steps[1] == len(np.unique(out.tokens[1, 5:9]))
    return counts, out


@pytest.mark.parametrize(("config", "counts"), [
    (dict(policy="confidence", num_steps=1), [20]),
    (dict(policy="margin", num_steps=3), [6, 7, 7]),
    (dict(policy="random_exact", num_steps=8), [2, 3] * 4),
    (dict(policy="entropy", num_steps=99), [1] * 20),
    (dict(policy="confidence", num_steps=10_000), [1] * 20),
    (dict(policy="first_hitting"), [1] * 20),
    (dict(policy="threshold", threshold=0.99999), [1] * 20),  # the toy is sure, but not as sure
    (dict(policy="threshold", threshold=0.9), [20]),
    (dict(policy="confidence", num_steps=4, step_schedule="cosine"), [2, 4, 7, 7]),
    (dict(policy="random_exact", num_steps=5, block_length=8), [4] * 5),
    (dict(policy="threshold", block_length=8), [8, 8, 4]),
], ids=str)
def test_each_step_reveals_as_many_as_scheduled(config, counts):
    found, out = counting(**config)
    assert found == counts
    if "num_steps" in config and "block_length" not in config:  # a row with fewer gaps has its own schedule
        assert out.steps[1] == min(4, config["num_steps"])


def test_a_canvas_may_be_changed_after_it_was_given():
    """JAX takes up an array that lies as it likes without a copy, and computes when it comes to it."""
    def start():
        tokens, fixed = aligned_empty((4, 64), np.int32), aligned_empty((4, 64), np.bool_)
        tokens[:], fixed[:] = 7, np.arange(64) < 20
        spec = SamplingSpec(SamplerConfig("confidence", num_steps=2, temperature=0.0), MASK, True)
        return tokens, fixed, sample(tiny("llama"), tokens, fixed, np.full(4, 64), keys_of(4), spec)

    expected = np.asarray(start()[-1].tokens)
    for _ in range(20):
        tokens, fixed, found = start()
        tokens[:], fixed[:] = 8, False
        np.testing.assert_array_equal(found.tokens, expected)


def test_the_random_policy_skips_the_steps_that_reveal_nothing():
    counts, out = counting(policy="random", num_steps=10_000)
    assert sum(counts) == 20 and len(counts) >= 19  # two of 20 in one of 10,000: a chance of 1 in 50
    assert out.steps[1] <= 4


def test_the_random_policy_reveals_in_the_release_s_proportions():
    rows, num_steps = 400, 5
    fixed = np.tile(np.arange(LENGTH) < 4, (rows, 1))
    out = run(Toy(masked_count), np.zeros((rows, LENGTH), int), fixed, mask=VOCAB - 1, policy="random",
              num_steps=num_steps, temperature=0.0)
    first = np.array([(row == 20).sum() for row in out.tokens[:, 4:]])  # revealed with 20 masks left
    expected = stats.binom(20, 1 / num_steps).pmf(np.arange(1, 11)) / (1 - (1 - 1 / num_steps) ** 20)
    # A step that reveals nothing leaves no trace, hence the law given at least one.
    assert stats.chisquare(np.bincount(first, minlength=12)[1:11], expected * rows, sum_check=False).pvalue > 1e-4
    assert out.steps.max() <= num_steps


def test_a_token_masked_again_is_as_likely_to_be_filled_in_the_same_step_as_one_that_was_masked():
    """Told by the token itself, which is another one of 999 when it is drawn anew."""
    rows, vocab = 300, 1000
    toy = Toy(lambda tokens: jnp.zeros((*tokens.shape, vocab)))
    spec = SamplingSpec(SamplerConfig("random_exact", num_steps=8, remask=0.4), vocab - 1, True)
    fixed = np.tile(np.arange(LENGTH) < 1, (rows, 1))
    states = list(stream(toy, np.zeros((rows, LENGTH), int), fixed, np.full(rows, LENGTH), keys_of(rows), spec))
    for before, after in itertools.pairwise(states[1:-1]):  # a first step has nothing to forget, a last one does not
        old, now = np.asarray(before.masked), np.asarray(after.masked)
        changed = ~old & ~now & np.asarray(before.tokens != after.tokens)
        filled, forgotten = (old & ~now).sum(), changed.sum() + (~old & now).sum()
        assert abs(forgotten / (~old & ~fixed).sum() - 0.4) < 0.05
        chance = (filled + changed.sum()) / (old.sum() + forgotten)
        assert abs(changed.sum() / forgotten - chance) < 4 * (chance * (1 - chance) / forgotten) ** 0.5 + 2e-3


@pytest.mark.parametrize("config", [
    dict(policy="confidence"), dict(policy="first_hitting"), dict(policy="random", num_steps=9),
    dict(policy="random_exact", remask=0.2, block_length=8), dict(policy="threshold", threshold=0.999999)],
    ids=lambda config: config["policy"])
def test_a_row_is_done_when_all_before_an_end_of_text_is_filled(config):
    ends = np.array([5, 20, 1, 25, 12])  # the fourth row has none
    tokens = np.repeat(ends[:, None], LENGTH, axis=1)
    fixed = np.tile(np.arange(LENGTH) < 1, (len(ends), 1))
    fixed[4, 15] = True
    settings = dict(mask=VOCAB - 1, eos=0, temperature=0.0, **config)
    out = run(Toy(ending), tokens, fixed, stop=True, **settings)
    for row, end in enumerate(ends):
        assert (out.tokens[row, 1:end] == np.where(fixed[row, 1:end], ends[row], 5)).all()
        assert (out.tokens[row, end:] == 0).sum() >= 1 or end >= LENGTH
        drawn = out.confidence[row] < 0
        assert drawn[1 : min(end + 1, LENGTH)].sum() == (~fixed[row, 1 : end + 1]).sum()
        np.testing.assert_array_equal(out.tokens[row, end + 1 :][~(drawn | fixed[row])[end + 1 :]], 0)
        assert fixed[row, 15] == (out.tokens[row, 15] == 12)
    full = run(Toy(ending), tokens, fixed, **settings)
    assert (out.steps <= full.steps).all()
    assert out.steps[3] == full.steps[3]
    if config["policy"] == "confidence":  # the end of text comes first, and then only what precedes it
        np.testing.assert_array_equal(out.steps, [5, 20, 1, 23, 12])


def test_any_of_several_ends_ends_a_text_and_none_is_drawn_that_is_forbidden():
    tokens = np.repeat(np.array([5, 20])[:, None], LENGTH, axis=1)
    settings = dict(mask=VOCAB - 1, policy="confidence", temperature=0.0)
    fixed = np.tile(np.arange(LENGTH) < 1, (2, 1))
    one, several = (run(Toy(ending), tokens, fixed, eos=eos, stop=True, **settings) for eos in (0, (7, 0)))
    np.testing.assert_array_equal(several.steps, one.steps)
    np.testing.assert_array_equal(several.tokens == 7, one.confidence + fixed == 0)  # behind the end
    out = run(Toy(ending), tokens, fixed, eos=(0, 5), eos_penalty=np.inf, **settings)
    assert not np.isin(out.tokens[:, 1:], (0, 5)).any()


def test_a_given_end_of_text_ends_nothing():
    tokens, fixed = np.full((1, LENGTH), 40), np.arange(LENGTH)[None] < 3
    tokens[0, 2] = 0
    out = run(Toy(ending), tokens, fixed, mask=VOCAB - 1, eos=0, stop=True, policy="confidence",
              temperature=0.0)
    assert (out.tokens[0, 3:] == 5).all()


@pytest.mark.parametrize(("policy", "settings", "words"), [
    ("first_hitting", dict(num_steps=19), "one token a step, and 20 are to be found in 19 steps; leave num_steps out"),
    ("autoregressive", {}, "fills no gap that has text behind it; choose another policy"),
    ("confidence", dict(mask=None), "the policy confidence needs a mask token; name one, or choose autoregressive"),
])
def test_what_cannot_be_filled_is_refused_before_the_first_step(policy, settings, words):
    tokens, fixed = np.zeros((2, 30), int), np.zeros((2, 30), bool)  # position 0 is no gap, whatever is said of it
    fixed[:, 9:18] = True
    fixed[0] = True
    mask = settings.pop("mask", MASK)
    spec = SamplingSpec(SamplerConfig(policy, **settings), mask, True)
    for start in (sample, lambda *arguments: next(stream(*arguments))):
        with pytest.raises(ConfigError, match=words) as refusal:
            start(tiny("llama"), tokens, fixed, np.array([30, 30]), keys_of(2), spec)
        assert "\n" not in str(refusal.value)


def test_as_many_steps_as_gaps_are_enough_for_one_token_a_step():
    tokens, fixed, lengths = problem("autoregressive")
    out = run(tiny("llama"), tokens, fixed & (np.arange(40) > 0), lengths, policy="first_hitting", num_steps=36)
    assert out.steps.max() == 36
