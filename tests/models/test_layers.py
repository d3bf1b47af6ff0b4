"""Rotary embedding, and the cache: computing a few positions at a time gives what computing all at once does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dlm_jax.attention import AttentionMask
from dlm_jax.errors import ConfigError
from dlm_jax.models import Cache, ModelConfig, RopeScaling, Transformer
from dlm_jax.models.layers import frequencies, rotary, rotate, rotation
from tests.random_models import random_model

LENGTH, WIDTH = 20, 8
SIZES = dict(vocab_size=61, hidden_size=32, num_heads=4, head_dim=8, mlp_size=48)
KINDS = {
    "llama": dict(num_kv_heads=2, max_length=64, qk_norm=True),
    "window": dict(num_kv_heads=2, max_length=64, sliding_window=5),
    "gpt2": dict(num_kv_heads=4, max_length=LENGTH, norm="layer", positions="learned", gated_mlp=False, qkv_bias=True,
                 tie_embeddings=True),
}
TOKENS = np.random.default_rng(0).integers(0, 61, (3, LENGTH))
LENGTHS = jnp.array([20, 13, 1])
every_kind = pytest.mark.parametrize("kind", KINDS)


@functools.cache
def model(kind, num_layers=2):
    config = ModelConfig(kind, num_layers=num_layers, **SIZES | KINDS[kind])
    return random_model(lambda: Transformer(config, rngs=nnx.Rngs(0)), stddev=0.3)


@jax.jit
def hidden(network, tokens, attention):
    return network.hidden(tokens, attention)


@jax.jit
def some_hidden(network, tokens, attention, positions, cache):
    """Returns the states at `positions` of the rows `tokens` [batch, length]; positions past the end are padding."""
    tokens = jnp.take_along_axis(tokens, jnp.minimum(positions, LENGTH - 1), axis=1)
    return network.cached_hidden(tokens, attention, positions, cache)


def empty(kind, num_layers=2):
    """Returns a cache with garbage where nothing has been written."""
    cache = Cache.empty(model(kind, num_layers).config, len(TOKENS), LENGTH, "float32")
    return jax.tree.map(lambda x: x + 3.0, cache)


def position_chunks(seed, unit=1):
    """Yields consecutive chunks of at most WIDTH positions, random per row, padded with positions past the end."""
    rng, start = np.random.default_rng(seed), np.zeros(len(TOKENS), int)
    while (start < LENGTH).any():
        stop = np.minimum(start + unit * rng.integers(0, WIDTH // unit + 1, len(TOKENS)), LENGTH)
        positions = start[:, None] + np.arange(WIDTH)
        yield np.where(positions < stop[:, None], positions, LENGTH + positions)
        start = stop


@every_kind
@pytest.mark.parametrize(("mask", "unit"), [(AttentionMask.causal(), 1), (AttentionMask.block_causal(4), 4)],
                         ids=["causal", "blocks"])
def test_any_chunks_give_the_states_of_one_pass(kind, mask, unit):
    expected = hidden(model(kind), TOKENS, mask)
    for seed in range(2):
        cache, found = empty(kind), np.zeros(expected.shape)
        for positions in position_chunks(seed, unit):
            states, cache = some_hidden(model(kind), TOKENS, mask, positions, cache)
            for row, (at, state) in enumerate(zip(positions, states, strict=True)):
                found[row, at[at < LENGTH]] = state[at < LENGTH]
        np.testing.assert_allclose(found, expected, atol=2e-5)


@every_kind
def test_recomputed_positions_give_the_same_states_and_cache(kind):
    """The mask is bidirectional and every key has been written; keys past a row's length are never seen."""
    mask, network = AttentionMask.bidirectional().with_lengths(LENGTHS), model(kind)
    expected = hidden(network, TOKENS, mask)
    every = np.tile(np.arange(LENGTH), (3, 1))
    states, cache = some_hidden(network, TOKENS, mask, every, empty(kind))
    np.testing.assert_allclose(states, expected, atol=2e-5)
    positions = np.stack([np.random.default_rng(row).permutation(LENGTH)[:WIDTH] for row in range(3)])
    states, rewritten = some_hidden(network, TOKENS, mask, positions, cache)
    np.testing.assert_allclose(states, np.take_along_axis(np.asarray(expected), positions[..., None], 1), atol=2e-5)
    for new, old in zip(rewritten, cache, strict=True):
        np.testing.assert_allclose(new, old, atol=2e-5)


def test_one_layer_needs_only_changed_tokens_recomputed():
    mask, network = AttentionMask.bidirectional().with_lengths(LENGTHS), model("llama", 1)
    _, cache = some_hidden(network, TOKENS, mask, np.tile(np.arange(LENGTH), (3, 1)), empty("llama", 1))
    positions = np.array([[3, 9, 4], [12, 0, 1], [0, 5, 19]])
    changed = TOKENS.copy()
    np.put_along_axis(changed, positions, 17, axis=1)
    states, _ = some_hidden(network, changed, mask, positions, cache)
    expected = np.asarray(hidden(network, changed, mask))
    np.testing.assert_allclose(states, np.take_along_axis(expected, positions[..., None], 1), atol=2e-5)


def test_write_drops_positions_past_the_end():
    cache = empty("llama")
    key, value = (jax.random.normal(jax.random.key(i), (3, 3, 2, 8)) for i in range(2))
    positions = jnp.array([[0, 20, 19], [7, 21, 40], [4, 3, 20]])
    written = cache.write(jnp.int32(1), positions, key, value)
    for old, new, values in zip(cache, written, (key, value), strict=True):
        expected = np.array(old)
        for row, slot in np.argwhere(positions < LENGTH):
            expected[1, row, positions[row, slot]] = values[row, slot]
        np.testing.assert_array_equal(new, expected)
    for width in (7, LENGTH):
        for read, stored in zip(written.read(jnp.int32(1), width), written, strict=True):
            np.testing.assert_array_equal(read, stored[1, :, :width])


@pytest.mark.parametrize("mask", [AttentionMask.causal(), AttentionMask.block_causal(4)], ids=["causal", "blocks"])
def test_what_no_query_sees_is_not_read(mask, monkeypatch):
    """In a long cache the states are the same whether all of it is read or a part, which NaN elsewhere shows."""
    network, length = model("llama"), 400  # rotary positions have no end
    cache = jax.tree.map(lambda x: jax.random.normal(jax.random.key(0), x.shape),
                         Cache.empty(network.config, 3, length, "float32"))
    assert len(cache.read_widths) > 3
    run = jax.jit(lambda network, cache, positions: network.cached_hidden(TOKENS[:, :3], mask, positions, cache)[0])
    for start in (0, 30, 60, 150, 250, 390):
        positions = start + jnp.arange(3) + jnp.array([[0], [4], [400]])  # the last row is not in the cache
        bound = next(width for width in cache.read_widths if width > start + 8)
        spoiled = Cache(*(x.at[:, :, bound:].set(jnp.nan) for x in cache))
        found = run(network, spoiled, positions)[:2]
        with monkeypatch.context() as patch:
            patch.setattr(Cache, "read_widths", property(lambda self: [length]))
            expected = jax.jit(run.__wrapped__)(network, cache, positions)[:2]
        np.testing.assert_allclose(found, expected, atol=2e-5)


def test_cache_keeps_its_dtype():
    cache = Cache.empty(model("llama").config, 3, LENGTH, "bfloat16")
    written = cache.write(jnp.int32(0), jnp.zeros((3, 1), int), jnp.ones((3, 1, 2, 8)), jnp.ones((3, 1, 2, 8)))
    assert {x.dtype.name for x in (*cache, *written)} == {"bfloat16"}


def test_rotary_scores_depend_on_the_distance_alone():
    rng, freqs = np.random.default_rng(0), frequencies(8, 10000.0, None)
    query, key = (jnp.asarray(rng.normal(size=(1, 1, 1, 8)), jnp.float32) for _ in range(2))
    score = lambda q, k: jnp.sum(rotate(query, rotation(jnp.array([q]), freqs))  # noqa: E731
                                 * rotate(key, rotation(jnp.array([k]), freqs)))
    np.testing.assert_allclose(score(9, 4), score(25, 20), atol=1e-5)
    assert abs(score(9, 4) - score(9, 5)) > 1e-3


def test_rotary_scaling():
    plain = frequencies(64, 500000.0, None)
    np.testing.assert_allclose(frequencies(64, 500000.0, RopeScaling("linear", 4.0)), plain / 4, rtol=1e-6)
    scaled = frequencies(64, 500000.0, RopeScaling("llama3", 8.0, 1.0, 4.0, 8192))
    wavelengths = 2 * np.pi / plain
    np.testing.assert_array_equal(scaled[wavelengths < 8192 / 4], plain[wavelengths < 8192 / 4])
    np.testing.assert_allclose(scaled[wavelengths > 8192], plain[wavelengths > 8192] / 8, rtol=1e-6)


def test_longer_rows_than_dynamic_scaling_is_implemented_for():
    config = ModelConfig("llama", 11, 8, 1, 1, 1, 8, 8, max_length=4, rope_scaling=RopeScaling("dynamic", 2.0))
    plain = rotation(jnp.arange(4), frequencies(8, 10000.0, None))
    jax.tree.map(np.testing.assert_array_equal, rotary(config, jnp.arange(4)), plain)
    with pytest.raises(ConfigError, match="dynamic"):
        rotary(config, jnp.arange(5))
