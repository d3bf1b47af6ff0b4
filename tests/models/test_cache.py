"""What is computed a few positions at a time, with cached keys and values, is what is computed at once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dlm_jax.attention import AttentionMask
from dlm_jax.models import Cache, ModelConfig, Transformer
from tests.compilation import quick

LENGTH, WIDTH = 20, 8
SIZES = dict(vocab_size=61, hidden_size=32, num_heads=4, head_dim=8, mlp_size=48, initializer_range=0.3)
KINDS = {
    "llama": dict(num_kv_heads=2, max_length=64, qk_norm=True),
    "window": dict(num_kv_heads=2, max_length=64, sliding_window=5),
    "gpt2": dict(num_kv_heads=4, max_length=LENGTH, norm="layer", positions="learned", gated_mlp=False, qkv_bias=True,
                 tie_embeddings=True),
}
TOKENS = np.random.default_rng(0).integers(0, 61, (3, LENGTH))
LENGTHS = jnp.array([20, 13, 1])
every_kind = pytest.mark.parametrize("kind", KINDS)
jit = functools.partial(jax.jit, compiler_options=quick())  # mostly compiles


@functools.cache
def model(kind, num_layers=2):
    config = ModelConfig(kind, num_layers=num_layers, **SIZES | KINDS[kind])
    return jit(lambda: Transformer(config, rngs=nnx.Rngs(0)))()


@jit
def hidden(network, tokens, attention):
    return network.hidden(tokens, attention)


@jit
def some_hidden(network, tokens, attention, positions, cache):
    """The states at `positions` of the rows `tokens` [batch, length], a position past the end being nothing."""
    part = jnp.take_along_axis(tokens, jnp.minimum(positions, LENGTH - 1), axis=1)
    return network.cached_hidden(part, attention, positions, cache)


def empty(kind, num_layers=2):
    """With garbage where nothing has been written."""
    cache = Cache.empty(model(kind, num_layers).config, len(TOKENS), LENGTH, "float32")
    return jax.tree.map(lambda x: x + 3.0, cache)


def parts(seed, unit=1):
    """Consecutive parts of at most WIDTH positions, each row's its own, filled up with what is past the end."""
    rng, begin = np.random.default_rng(seed), np.zeros(len(TOKENS), int)
    while (begin < LENGTH).any():
        end = np.minimum(begin + unit * rng.integers(0, WIDTH // unit + 1, len(TOKENS)), LENGTH)
        at = begin[:, None] + np.arange(WIDTH)
        yield np.where(at < end[:, None], at, LENGTH + at)
        begin = end


@every_kind
@pytest.mark.parametrize(("mask", "unit"), [(AttentionMask.causal(), 1), (AttentionMask.block_causal(4), 4)],
                         ids=["causal", "blocks"])
def test_any_split_into_parts_gives_the_states_of_the_whole(kind, mask, unit):
    expected = hidden(model(kind), TOKENS, mask)
    for seed in range(3):
        cache, found = empty(kind), np.zeros(expected.shape)
        for positions in parts(seed, unit):
            states, cache = some_hidden(model(kind), TOKENS, mask, positions, cache)
            for row, (at, state) in enumerate(zip(positions, states, strict=True)):
                found[row, at[at < LENGTH]] = state[at < LENGTH]
        np.testing.assert_allclose(found, expected, atol=2e-5)


@every_kind
def test_positions_seen_again_in_any_order_give_the_same_states_and_cache(kind):
    """Bidirectionally, when every key has been written; what lies behind a row's length is never seen."""
    mask, network = AttentionMask.bidirectional().with_lengths(LENGTHS), model(kind)
    expected = hidden(network, TOKENS, mask)
    every = np.tile(np.arange(LENGTH), (3, 1))
    states, whole = some_hidden(network, TOKENS, mask, every, empty(kind))
    np.testing.assert_allclose(states, expected, atol=2e-5)
    positions = np.stack([np.random.default_rng(row).permutation(LENGTH)[:WIDTH] for row in range(3)])
    states, remat = some_hidden(network, TOKENS, mask, positions, whole)
    np.testing.assert_allclose(states, np.take_along_axis(np.asarray(expected), positions[..., None], 1), atol=2e-5)
    for new, old in zip(remat, whole, strict=True):
        np.testing.assert_allclose(new, old, atol=2e-5)


@every_kind
def test_with_one_layer_a_new_token_is_all_that_needs_computing(kind):
    mask, network = AttentionMask.bidirectional().with_lengths(LENGTHS), model(kind, 1)
    _, cache = some_hidden(network, TOKENS, mask, np.tile(np.arange(LENGTH), (3, 1)), empty(kind, 1))
    positions = np.array([[3, 9, 4], [12, 0, 1], [0, 5, 19]])
    changed = TOKENS.copy()
    np.put_along_axis(changed, positions, 17, axis=1)
    states, _ = some_hidden(network, changed, mask, positions, cache)
    expected = np.asarray(hidden(network, changed, mask))
    np.testing.assert_allclose(states, np.take_along_axis(expected, positions[..., None], 1), atol=2e-5)


def test_what_is_written_past_the_end_is_dropped_and_the_rest_is_put_where_it_belongs():
    cache = empty("llama")
    key, value = (jax.random.normal(jax.random.key(i), (3, 3, 2, 8)) for i in range(2))
    positions = jnp.array([[0, 20, 19], [7, 21, 40], [4, 3, 20]])
    written = cache.write(jnp.int32(1), positions, key, value)
    for old, new, part in zip(cache, written, (key, value), strict=True):
        expected = np.array(old)
        for row, slot in np.argwhere(positions < LENGTH):
            expected[1, row, positions[row, slot]] = part[row, slot]
        np.testing.assert_array_equal(new, expected)
    for read, stored in zip(written.read(jnp.int32(1)), written, strict=True):
        np.testing.assert_array_equal(read, stored[1])


def test_a_cache_keeps_its_type():
    cache = Cache.empty(model("llama").config, 3, LENGTH, "bfloat16")
    written = cache.write(jnp.int32(0), jnp.zeros((3, 1), int), jnp.ones((3, 1, 2, 8)), jnp.ones((3, 1, 2, 8)))
    assert {x.dtype.name for x in (*cache, *written)} == {"bfloat16"}
