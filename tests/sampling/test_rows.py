"""A row of a batch: it depends on nothing but its own tokens and key, and keeps what it was given."""

import numpy as np
import pytest

from dlm_jax.sampling import POLICIES
from tests.sampling.tools import EOS, MASK, SETTINGS, is_gap, keys_of, problem, run, tiny

every_setting = pytest.mark.parametrize(("kind", "settings"), [pytest.param(*rest, id=name)
                                                               for name, *rest in SETTINGS])


def test_the_settings_here_cover_every_policy():
    assert {settings["policy"] for _, _, settings in SETTINGS} == set(POLICIES)


@every_setting
def test_a_row_does_not_depend_on_batch_padding_or_what_stands_in_a_gap(kind, settings):
    tokens, fixed, lengths = problem(settings["policy"])
    together = run(tiny(kind), tokens, fixed, lengths, **settings)

    rng = np.random.default_rng(5)
    outside = np.arange(40) >= lengths[:, None]
    garbage = np.where(is_gap(fixed, lengths) | outside, rng.integers(0, 61, tokens.shape), tokens)
    dirty = run(tiny(kind), garbage, np.where(outside, rng.random(fixed.shape) < 0.5, fixed), lengths, **settings)
    for found, expected in zip(dirty, together, strict=True):
        np.testing.assert_array_equal(found[~outside] if found.ndim == 2 else found,
                                      expected[~outside] if found.ndim == 2 else expected)

    for row in (1, 2):  # a row alone, on a narrower canvas
        one, length = slice(row, row + 1), lengths[row]
        alone = run(tiny(kind), tokens[one, :32], fixed[one, :32], lengths[one], keys=keys_of(4)[one], **settings)
        np.testing.assert_array_equal(alone.tokens[0, :length], together.tokens[row, :length])
        np.testing.assert_allclose(alone.confidence[0, :length], together.confidence[row, :length], atol=1e-4)
        assert alone.steps[0] == together.steps[row]


@every_setting
def test_given_tokens_and_padding_stay_and_the_mask_is_never_written(kind, settings):
    tokens, fixed, lengths = problem(settings["policy"])
    tokens[0, 3], fixed[0, 3] = MASK, True  # the mask's id as a given token is a token
    out = run(tiny(kind), tokens, fixed, lengths, **settings)
    gaps = is_gap(fixed, lengths)
    np.testing.assert_array_equal(out.tokens[~gaps], tokens[~gaps])
    assert not (out.tokens[gaps] == MASK).any()
    assert (out.confidence[~gaps] == 0).all()
    behind = np.cumsum(gaps & (out.tokens == EOS), axis=1) > 1  # text that was not drawn
    drawn = gaps & ~behind if settings.get("stop") else gaps
    assert (out.confidence[drawn] < 0).all()
    assert behind.any() or "stop" not in settings


@every_setting
def test_no_row_takes_more_steps_than_it_has_gaps_or_was_given(kind, settings):
    tokens, fixed, lengths = problem(settings["policy"])
    out, gaps = run(tiny(kind), tokens, fixed, lengths, **settings), is_gap(fixed, lengths).sum(axis=1)
    if "remask" not in settings:
        assert (out.steps <= gaps).all()
    if "num_steps" in settings and "block_length" not in settings:
        assert (out.steps <= settings["num_steps"]).all()
    if settings["policy"] == "first_hitting":
        assert (out.steps == gaps).all()


def settings_of(name):
    return next((tiny(kind), settings) for known, kind, settings in SETTINGS if known == name)


@pytest.mark.parametrize("name", ["first_hitting", "autoregressive"])
def test_position_0_is_context_even_where_it_is_not_said_to_be_given(name):
    model, settings = settings_of(name)
    tokens, fixed, lengths = problem(settings["policy"])
    out = [run(model, tokens, given, lengths, **settings).tokens
           for given in (fixed | (np.arange(40) == 0), fixed & (np.arange(40) > 0))]
    np.testing.assert_array_equal(out[0][:, 0], tokens[:, 0])
    np.testing.assert_array_equal(*out)


@pytest.mark.parametrize("name", ["confidence", "autoregressive"])
def test_where_nothing_is_to_be_filled_the_tokens_come_back(name):
    model, settings = settings_of(name)
    tokens, fixed, lengths = problem()
    out = run(model, tokens, np.ones_like(fixed), np.minimum(lengths, 32), **settings)
    np.testing.assert_array_equal(out.tokens, tokens)
    assert (out.steps == 0).all()


def test_other_keys_give_other_rows_and_the_same_key_the_same():
    model, settings = settings_of("confidence")
    out = [run(model, *problem(), keys=keys_of(4, seed), **settings).tokens for seed in (0, 0, 1)]
    assert (out[0] == out[1]).all()
    assert (out[0] != out[2]).any(axis=1)[:3].all()
