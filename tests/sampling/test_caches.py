"""Cached keys and values: exact where nothing has grown stale, and in use where it has."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from dlm_jax.attention import AttentionMask
from dlm_jax.sampling import SamplerConfig, SamplingSpec, loop
from tests.sampling.tools import MASK, is_gap, keys_of, problem, run, tiny

SETTINGS = dict(policy="confidence", num_steps=20, block_length=8, temperature=0.8)
@functools.cache
def tokens_of(kind, layers, **settings):
    return run(tiny(kind, num_layers=layers), *problem(), **SETTINGS | settings).tokens


@pytest.mark.parametrize(("kind", "cache"), [("llama", "prefix"), ("gpt2", "dual")])
def test_a_cache_refreshed_at_every_step_changes_nothing_and_a_stale_one_does(kind, cache):
    fresh = tokens_of(kind, 2, cache=cache, cache_refresh_interval=1)
    np.testing.assert_array_equal(fresh, tokens_of(kind, 2))
    assert (tokens_of(kind, 2, cache=cache) != fresh).any()


@pytest.mark.parametrize(("kind", "cache"), [("gpt2", "prefix"), ("window", "dual")])
@pytest.mark.parametrize(("cfg_scale", "shift"), [(0.0, True), (0.5, False)], ids=["plain", "guidance and no shift"])
def test_with_one_layer_nothing_outside_the_block_grows_stale(kind, cache, cfg_scale, shift):
    """Keys and values of the first layer depend on the tokens where they are, and those change in the block alone."""
    np.testing.assert_array_equal(tokens_of(kind, 1, cache=cache, cfg_scale=cfg_scale, shift=shift),
                                  tokens_of(kind, 1, cfg_scale=cfg_scale, shift=shift))


@pytest.mark.parametrize(("kind", "cache"), [("llama", "prefix"), ("gpt2", "dual")])
def test_a_block_as_long_as_the_row_begins_with_everything_computed(kind, cache):
    settings = SETTINGS | dict(block_length=40, num_steps=1)
    out = run(tiny(kind), *problem(), cache=cache, **settings)
    np.testing.assert_array_equal(out.tokens, run(tiny(kind), *problem(), **settings).tokens)
    # Nor does it matter after that, where the prompt is but one token: the block is all there is to see.
    settings["num_steps"] = 5
    tokens, _, lengths = problem()
    fixed = np.arange(40) < np.ones((4, 1))
    out = run(tiny(kind), tokens, fixed, lengths, cache=cache, **settings)
    np.testing.assert_array_equal(out.tokens, run(tiny(kind), tokens, fixed, lengths, **settings).tokens)


@pytest.mark.parametrize(("cache", "outside"), [("prefix", "before"), ("dual", "either side")])
def test_what_is_kept_lies_outside_the_block(cache, outside):
    """From a block's second step on, keys are those of the row as it is in the block, and of its start elsewhere."""
    model, (tokens, fixed, lengths) = tiny("llama"), problem()
    states = list(loop.stream(model, tokens, fixed, lengths, keys_of(4),
                              SamplingSpec(SamplerConfig(**SETTINGS, cache=cache), MASK, True)))
    gaps = is_gap(fixed, lengths)
    first = next(i for i, state in enumerate(states) if state.steps_in_block == 0 and i > 0)
    begin, end = first, next(i for i, state in enumerate(states) if state.steps_in_block == 0 and i > first)
    assert end - begin > 2
    now, last = states[end - 1], states[end - 2]  # `now` was computed from the tokens of `last`
    kept = np.asarray(states[begin + 1].cache.value)  # everything, as it was at the block's first step
    cache_now = np.asarray(now.cache.value)
    whole = model.cached_hidden(last.tokens, AttentionMask.bidirectional().with_lengths(jnp.asarray(lengths)),
                                jnp.broadcast_to(jnp.arange(40), (4, 40)), states[begin].cache)[1].value
    for row in range(4):
        here = np.flatnonzero(gaps[row] & _in_block(gaps[row], int(now.block)))
        if not len(here) or not (np.asarray(last.masked[row])[here]).any():
            continue
        at, inside = np.arange(lengths[row]), np.arange(here[0] - 1, min(here[0] + 8, lengths[row]))
        old = at[at < inside[0]] if outside == "before" else np.setdiff1d(at, inside)
        np.testing.assert_array_equal(cache_now[:, row, old], kept[:, row, old])
        assert (np.abs(cache_now[1][row, old] - whole[1][row, old]) > 1e-6).any()
        np.testing.assert_allclose(cache_now[0][row, :], whole[0][row, :], atol=1e-5)
        assert (np.abs(cache_now[1][row, inside] - kept[1][row, inside]) > 1e-6).any()


def _in_block(gaps, number):
    """Which positions lie in the block of this number, by walking along the row."""
    block, end, inside = -1, 0, np.zeros(len(gaps), bool)
    for position in np.flatnonzero(gaps):
        if position >= end:
            block, end = block + 1, position + 8
        inside[position] = block == number
    return inside
