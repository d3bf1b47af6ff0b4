"""Steps: which caches are exact, and which entries of the others are stale; blocks; autoregressive decoding."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_jax.attention import AttentionMask
from dlm_jax.diffusion import BlockSpec
from dlm_jax.sampling import stream
from tests.sampling.tiny_models import EOS, MASK, is_gap, make_batch, make_keys, make_spec, run_sampler, tiny

SETTINGS = dict(policy="confidence", num_steps=20, block_length=8, temperature=0.8)


@functools.cache
def cached_tokens(kind, layers, **settings):
    return run_sampler(tiny(kind, num_layers=layers), *make_batch(), **SETTINGS | settings).tokens


@pytest.mark.parametrize(("kind", "cache"), [
    ("llama", "prefix"), ("gpt2", "dual"), ("two types and experts", "dual")])
def test_cache_refreshed_at_every_step_is_exact(kind, cache):
    np.testing.assert_array_equal(cached_tokens(kind, 2, cache=cache, cache_refresh_interval=1), cached_tokens(kind, 2))


@pytest.mark.parametrize(("kind", "cache", "settings"), [
    ("gpt2", "prefix", dict()), ("window", "dual", dict(cfg_scale=0.5, shift=False))], ids=["prefix", "dual"])
def test_cache_of_one_layer_is_exact(kind, cache, settings):
    """The first layer's keys and values depend on the token at their position alone, and only the block changes."""
    np.testing.assert_array_equal(cached_tokens(kind, 1, cache=cache, **settings), cached_tokens(kind, 1, **settings))


def test_cache_with_block_as_long_as_row_is_exact():
    tokens, fixed, lengths = make_batch()
    settings = SETTINGS | dict(block_length=40, num_steps=5)
    for given in (fixed, np.arange(40) < np.ones((4, 1))):
        found, expected = (run_sampler(tiny("llama"), tokens, given, lengths, **settings, **more).tokens
                           for more in (dict(cache="prefix"), {}))
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_stale_entries_are_outside_the_block(cache):
    """From a block's second step on, cached keys are those of its first step outside the block, and fresh inside."""
    model, (tokens, fixed, lengths) = tiny("llama"), make_batch()
    states = list(stream(model, tokens, fixed, lengths, make_keys(4), make_spec(**SETTINGS, cache=cache)))
    gaps = is_gap(fixed, lengths)
    begin, end = [i for i, state in enumerate(states) if state.steps_in_block == 0 and i > 0][:2]
    assert end - begin > 2
    now, last = states[end - 1], states[end - 2]  # `now` was computed from the tokens of `last`
    kept = np.asarray(states[begin + 1].cache.value)  # all keys and values as of the block's first step
    found = np.asarray(now.cache.value)
    fresh = fresh_cache(model, last.tokens, jnp.asarray(lengths), states[begin].cache)
    for row in range(4):
        here = np.flatnonzero(gaps[row] & in_block(gaps[row], int(now.block)))
        if not len(here) or not (np.asarray(last.masked[row])[here]).any():
            continue
        at, inside = np.arange(lengths[row]), np.arange(here[0] - 1, min(here[0] + 8, lengths[row]))
        stale = at[at < inside[0]] if cache == "prefix" else np.setdiff1d(at, inside)
        np.testing.assert_array_equal(found[:, row, stale], kept[:, row, stale])
        assert (np.abs(found[1][row, stale] - fresh[1][row, stale]) > 1e-6).any()
        np.testing.assert_allclose(found[0][row, :], fresh[0][row, :], atol=1e-5)
        assert (np.abs(found[1][row, inside] - kept[1][row, inside]) > 1e-6).any()


@jax.jit
def fresh_cache(model, tokens, lengths, cache):
    """Returns all keys and values, computed from the tokens."""
    return model.cached_hidden(tokens, AttentionMask.bidirectional().with_lengths(lengths),
                               jnp.broadcast_to(jnp.arange(40), tokens.shape), cache)[1].value


def in_block(gaps, number):
    """Returns which positions are in the block of this number, by a loop over the row."""
    block, end, inside = -1, 0, np.zeros(len(gaps), bool)
    for position in np.flatnonzero(gaps):
        if position >= end:
            block, end = block + 1, position + 8
        inside[position] = block == number
    return inside


def test_autoregressive_matches_decoding_without_cache():
    model = tiny("window")
    tokens, fixed, lengths = make_batch("autoregressive")
    out = run_sampler(model, tokens, fixed, lengths, policy="autoregressive", temperature=0.0)
    logits = np.array(jax.jit(lambda model, tokens: model(tokens, AttentionMask.causal()))(model, out.tokens))
    logits[:, :, MASK] = -np.inf
    gaps = is_gap(fixed, lengths)
    np.testing.assert_array_equal(out.tokens[gaps], np.roll(logits.argmax(-1), 1, axis=1)[gaps])


# Models with blocks.

SIZE, WIDTH = 4, 24
TOKENS = np.random.default_rng(3).integers(0, EOS, (4, WIDTH))
GIVEN, LENGTHS = np.array([1, 4, 7, 12]), np.array([24, 18, 23, 13])
FIXED = np.arange(WIDTH) < GIVEN[:, None]


def block_spec(**settings):
    return make_spec(**dict(policy="confidence", temperature=0.8, blocks=BlockSpec(SIZE)) | settings)


def stream_states(spec, kind="llama", rows=slice(None)):
    arrays = TOKENS[rows], FIXED[rows], LENGTHS[rows], make_keys(4)[rows]
    return jax.device_get([state._replace(cache=None) for state in stream(tiny(kind), *arrays, spec)])


@functools.partial(jax.jit, static_argnames=("kind", "shift", "blocks"))
def uncached_log_probs(tokens, kind, shift, blocks):
    """Returns log-probabilities [batch, length, vocab] of every position, from one pass over noisy and clean copies."""
    padding = jnp.arange(WIDTH) >= LENGTHS[:, None]
    mask = blocks.training_mask(WIDTH).with_segments(padding)
    hidden = tiny(kind).hidden(jnp.tile(tokens, 2), mask, positions=jnp.arange(2 * WIDTH) % WIDTH)
    noisy, clean = jnp.split(hidden, 2, axis=1)
    if shift:
        starts = (jnp.arange(WIDTH) % SIZE == 0)[:, None]
        noisy = jnp.where(starts, jnp.roll(clean, 1, axis=1), jnp.roll(noisy, 1, axis=1))
    return jax.nn.log_softmax(tiny(kind).unembed(noisy).at[:, :, MASK].set(-jnp.inf))


@pytest.mark.parametrize("kind, shift, blocks", [
    ("llama", True, BlockSpec(SIZE)), ("gpt2", False, BlockSpec(SIZE)),
    ("window", True, BlockSpec(SIZE, "block_bidirectional")), ("llama", False, BlockSpec(SIZE, "block_bidirectional")),
    ("llama", True, BlockSpec(SIZE, noised_attention="causal"))])
def test_block_cache_is_exact(kind, shift, blocks):
    """At every step, the revealed tokens and their log-probabilities are those of a pass without cache."""
    states = stream_states(block_spec(shift=shift, blocks=blocks, temperature=0.0, num_steps=20), kind)
    for before, after in itertools.pairwise(states):
        expected = np.asarray(uncached_log_probs(before.tokens, kind, shift, blocks))
        revealed = before.masked & ~after.masked
        np.testing.assert_array_equal(after.tokens[revealed], expected.argmax(axis=-1)[revealed])
        np.testing.assert_allclose(after.confidence[revealed], expected.max(axis=-1)[revealed], atol=2e-4)
        assert revealed.any()


@pytest.mark.parametrize("settings", [
    dict(policy="random", num_steps=9), dict(policy="random_exact", num_steps=9),
    dict(policy="threshold", threshold=1e-9)], ids=lambda settings: settings["policy"])
def test_policies_fill_block_after_block(settings):
    states = stream_states(block_spec(**settings))
    gaps, last = states[0].masked, states[-1]
    for before, after in itertools.pairwise(states):
        revealed = before.masked & ~after.masked
        for row in range(4):
            assert (np.flatnonzero(revealed[row]) // SIZE == before.block[row]).all()
    assert not last.masked.any() and (last.tokens != MASK)[gaps].all()
    np.testing.assert_array_equal(last.tokens[~gaps], TOKENS[~gaps])
    if settings["policy"] == "threshold":  # one step per block
        np.testing.assert_array_equal(last.steps, -(-LENGTHS // SIZE) - GIVEN // SIZE)
    else:
        assert (last.steps <= 9).all() and last.steps[0] == 9


def test_rows_with_blocks_are_independent():
    spec = block_spec(num_steps=20)
    states = stream_states(spec)
    blocks = np.array([state.block for state in states])
    assert (np.ptp(blocks[:3], axis=1) > 0).all()  # each row in its own block
    for row in range(4):
        alone = stream_states(spec, rows=slice(row, row + 1))[-1]
        np.testing.assert_array_equal(states[-1].tokens[row], alone.tokens[0])
        assert states[-1].steps[row] == alone.steps[0]


def test_blocks_after_eos_are_not_filled():
    full = stream_states(block_spec(num_steps=20))[-1]
    eos = int(full.tokens[0, 5])
    last = stream_states(block_spec(num_steps=20, eos=eos, stop=True))[-1]
    end = int(np.argmax((last.tokens[0] == eos) & ~FIXED[0]))
    end = (end // SIZE + 1) * SIZE  # tokens of the same block may be there already
    assert (last.tokens[0, end:] == eos).all() and last.steps[0] < full.steps[0]


def test_blocks_of_one_token_are_autoregressive_decoding():
    blocks = stream_states(block_spec(blocks=BlockSpec(1), temperature=0.0))[-1]
    parent = stream_states(block_spec(blocks=None, policy="autoregressive", temperature=0.0))[-1]
    np.testing.assert_array_equal(blocks.tokens, parent.tokens)
    np.testing.assert_allclose(blocks.confidence, parent.confidence, atol=2e-4)
