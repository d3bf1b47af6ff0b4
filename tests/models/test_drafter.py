import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dlm_jax.attention import AttentionMask
from dlm_jax.errors import ConfigError
from dlm_jax.models import (
    Cache,
    DraftedModel,
    Drafter,
    DrafterConfig,
    ModelConfig,
    Transformer,
    abstract_model,
    spread_layer_ids,
)
from tests.random_models import random_model

TARGET = ModelConfig("llama", vocab_size=61, hidden_size=32, num_layers=6, num_heads=4, num_kv_heads=2, head_dim=8,
                     mlp_size=48, max_length=64)
LAYERS = dataclasses.replace(TARGET, family="qwen3", num_layers=3, qk_norm=True, sliding_window=6)
DFLASH = DrafterConfig(LAYERS, target_layer_ids=(1, 2, 4), block_size=4, mask_token_id=60, sample_from_anchor=False)
DSPARK = dataclasses.replace(DFLASH, sample_from_anchor=True, markov_rank=8, confidence_head=True)
DFLASH2 = dataclasses.replace(DFLASH, conv_kernel_size=2, selector_rank=8, selector_top_k=5)
SLIDING = dataclasses.replace(DFLASH, sliding_layers=(0, 2))
KINDS = {"dflash": DFLASH, "dflash2": DFLASH2, "sliding": SLIDING,
         "causal": dataclasses.replace(DFLASH, causal=True, sliding_layers=(0, 1, 2), sliding_causal=False)}
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 60, (2, 24)))
ANCHORS = jnp.array([[3, 10, 17], [1, 2, 20]])


@functools.cache
def build(config):
    """Returns a model whose every parameter is random, so that no part of it is the identity."""
    return DraftedModel(random_model(lambda: Transformer(TARGET, rngs=nnx.Rngs(0))),
                        random_model(lambda: Drafter(config, rngs=nnx.Rngs(0)), stddev=0.3, seed=1))


@jax.jit
def features_of(target, tokens):
    return target.hidden_and_features(tokens, AttentionMask.causal(), DFLASH.target_layer_ids)[1]


@jax.jit
def block_states(model, features, tokens, anchors):
    """Returns [batch, A, B, embed] of the training forward."""
    embeddings = model.block_embeddings(jnp.take_along_axis(tokens, anchors, axis=1))
    hidden = model.drafter.hidden(model.drafter.fuse(features), embeddings, anchors)
    return hidden.reshape(*anchors.shape, -1, TARGET.hidden_size)


@jax.jit
def decode(model, features, tokens, anchors):
    """Returns the states of one block per row, after the text before it was read in two pieces; the cache is longer."""
    drafter, length = model.drafter, 30
    cache = jax.tree.map(lambda x: x + 7.0, drafter.empty_cache(2, length))  # what was never written must not be seen
    for part in (slice(0, 2), slice(2, 24)):
        positions = jnp.broadcast_to(jnp.arange(24)[part], tokens[:, part].shape)
        known = jnp.where(positions < anchors[:, None], positions, length)  # past the end: not written
        cache = drafter.extend_cache(drafter.fuse(features[:, part]), known, cache)
    embeddings = model.block_embeddings(jnp.take_along_axis(tokens, anchors[:, None], axis=1))
    return drafter.cached_hidden(embeddings, anchors[:, None] + jnp.arange(4), cache)


@pytest.mark.parametrize("kind", KINDS)
def test_training_of_an_anchor_is_decoding_there(kind):
    model = build(KINDS[kind])
    features = features_of(model.target, TOKENS)
    expected = block_states(model, features, TOKENS, ANCHORS)
    for i in range(ANCHORS.shape[1]):
        np.testing.assert_allclose(decode(model, features, TOKENS, ANCHORS[:, i]), expected[:, i], atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_sees_what_is_before_its_anchor_and_itself(kind):
    model, config = build(KINDS[kind]), KINDS[kind]
    features, changed = features_of(model.target, TOKENS), TOKENS.at[:, 11:].add(1) % 60
    expected = block_states(model, features, TOKENS, ANCHORS)
    found = block_states(model, features_of(model.target, changed), changed, ANCHORS)
    same = np.asarray(ANCHORS) <= 10
    np.testing.assert_array_equal(found[same], expected[same])  # tokens after the anchor, and the other blocks
    assert (jnp.abs(found - expected)[~same].max(axis=(-1, -2)) > 1e-3).all()

    moved = lambda at: jnp.abs(block_states(model, features.at[:, at].add(1.0), TOKENS, ANCHORS)  # noqa: E731
                               - expected).max(axis=(-1, -2))
    far = len(config.sliding_layers) < 3  # position 10 is outside the window of the blocks at 17 and 20
    assert (moved(10) > 0).tolist() == [[False, False, far]] * 2
    assert (moved(9) > 0).tolist() == [[False, True, far], [False, False, far]]


def test_packed_documents_do_not_see_each_other():
    model, drafter = build(SLIDING), build(SLIDING).drafter
    fused = jax.random.normal(jax.random.key(0), (1, 24, 32))
    embeddings = jax.random.normal(jax.random.key(1), (1, 8, 32))
    segments = jnp.repeat(jnp.array([[0, 1]]), 12, axis=1)
    positions = jnp.arange(24)[None] % 12
    packed = jax.jit(lambda d, f: d.hidden(f, embeddings, jnp.array([[5, 17]]), positions=positions,
                                           segment_ids=segments))(drafter, fused)
    alone = jax.jit(lambda d, f: d.hidden(f, embeddings[:, 4:], jnp.array([[5]])))(drafter, fused[:, 12:])
    np.testing.assert_allclose(packed[:, 4:], alone, atol=1e-5)
    assert model.target.config == TARGET


def test_within_a_block_attention_is_bidirectional_or_causal():
    embeddings, fused = jax.random.normal(jax.random.key(0), (1, 4, 32)), jnp.ones((1, 12, 32))
    run = jax.jit(lambda drafter, x: drafter.hidden(fused, x, jnp.array([[9]])))

    def moved(config):
        drafter = build(config).drafter
        return (jnp.abs(run(drafter, embeddings.at[:, 2].add(1.0)) - run(drafter, embeddings)).max(-1)[0] > 0).tolist()

    sliding = dataclasses.replace(DFLASH, sliding_layers=(0, 1, 2))
    assert moved(DFLASH) == [True] * 4
    assert moved(dataclasses.replace(DFLASH, causal=True)) == [False, False, True, True]
    assert moved(sliding) == [False, False, True, True]
    assert moved(dataclasses.replace(sliding, sliding_causal=False)) == [True] * 4


def test_features_are_what_layers_put_out():
    model, causal, ids = build(DFLASH).target, AttentionMask.causal(), DFLASH.target_layer_ids
    hidden, features = jax.jit(lambda m: m.hidden_and_features(TOKENS, causal, ids))(model)
    np.testing.assert_array_equal(hidden, jax.jit(lambda m: m.hidden(TOKENS, causal))(model))
    for place, layer in ((0, 1), (2, 4)):
        cut = nnx.clone(model)
        cut.config = dataclasses.replace(TARGET, num_layers=layer + 1)
        cut.blocks = jax.tree.map(lambda x, n=layer + 1: x[:n], model.blocks)
        cut.final_norm = lambda x: x
        expected = jax.jit(lambda m=cut: m.hidden(TOKENS, causal))()
        np.testing.assert_allclose(features[..., 32 * place : 32 * (place + 1)], expected, atol=1e-5)

    @jax.jit
    def in_two_pieces(model):
        cache, found = Cache.empty(TARGET, 2, 30, "float32"), []
        for part in (slice(0, 2), slice(2, 24)):
            positions = jnp.broadcast_to(jnp.arange(24)[part], TOKENS[:, part].shape)
            _, cache, piece = model.cached_hidden_and_features(TOKENS[:, part], causal, positions, cache, ids)
            found.append(piece)
        return jnp.concatenate(found, axis=1)

    np.testing.assert_allclose(in_two_pieces(model), features, atol=1e-5)


@pytest.mark.parametrize("num_layers, expected", [
    (24, (1, 6, 11, 16, 21)), (28, (1, 7, 13, 19, 25)), (36, (1, 9, 17, 25, 33)), (40, (1, 10, 19, 28, 37)),
    (64, (1, 16, 31, 46, 61))])
def test_layers_are_spread_as_dflash_spreads_them(num_layers, expected):
    assert spread_layer_ids(num_layers, 5) == expected
    assert spread_layer_ids(num_layers, 1) == (num_layers // 2,)


def test_a_new_dflash2_is_dflash():
    fresh = jax.jit(lambda: [Drafter(c, rngs=nnx.Rngs(1)) for c in (DFLASH, DFLASH2)])()
    shared = nnx.state(fresh[0])
    nnx.update(fresh[1], shared)
    fused, x = jax.random.normal(jax.random.key(0), (2, 24, 32)), jax.random.normal(jax.random.key(1), (2, 12, 32))
    run = jax.jit(lambda d: d.hidden(fused, x, ANCHORS))
    np.testing.assert_array_equal(run(fresh[1]), run(fresh[0]))
    candidates, logits = jnp.arange(10).reshape(2, 5), jax.random.normal(jax.random.key(2), (2, 5))
    np.testing.assert_array_equal(fresh[1].select(jnp.array([3, 4]), x[:, 0], candidates, logits), logits)


@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn"])
def test_markov_heads(kind):
    drafter = build(dataclasses.replace(DSPARK, markov_head=kind)).drafter
    hidden, previous = jax.random.normal(jax.random.key(0), (2, 4, 32)), TOKENS[:, :4]
    at_once = jax.jit(lambda d: d.markov.unembed(d.markov.steps(previous, hidden)))(drafter)
    state = drafter.markov_state((2,))
    for slot in range(4):
        bias, state = drafter.markov_bias(previous[:, slot], hidden[:, slot], state)
        np.testing.assert_allclose(bias, at_once[:, slot], atol=1e-5)
    drafter = nnx.clone(drafter)
    drafter.markov.next[...] = jnp.zeros_like(drafter.markov.next[...])
    assert not drafter.markov.unembed(drafter.markov.steps(previous, hidden)).any()


def test_what_does_not_fit_is_refused():
    drafter = build(DFLASH).drafter
    with pytest.raises(ConfigError, match="vocab_size"):
        DraftedModel(abstract_model(dataclasses.replace(TARGET, vocab_size=62)), drafter)
    with pytest.raises(ConfigError, match="layer 4"):
        DraftedModel(abstract_model(dataclasses.replace(TARGET, num_layers=5)), drafter)
    for change in (dict(target_layer_ids=(2, 1)), dict(block_size=1), dict(mask_token_id=61),
                   dict(sliding_layers=(3,)), dict(markov_head="other")):
        with pytest.raises(ConfigError):
            dataclasses.replace(DFLASH, **change)
