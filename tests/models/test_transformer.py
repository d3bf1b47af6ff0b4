import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dlm_jax.attention import AttentionMask
from dlm_jax.errors import ConfigError
from dlm_jax.models import Compute, ModelConfig, Transformer, abstract_model
from tests.random_models import random_model

GPT2 = ModelConfig("gpt2", vocab_size=61, hidden_size=32, num_layers=3, num_heads=4, num_kv_heads=4, head_dim=8,
                   mlp_size=64, max_length=24, norm="layer", positions="learned", gated_mlp=False,
                   activation="gelu_tanh", qkv_bias=True, out_bias=True, mlp_bias=True, tie_embeddings=True,
                   embed_dropout=0.1, attention_dropout=0.1, residual_dropout=0.1)
QWEN3 = ModelConfig("qwen3", vocab_size=61, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=12,
                    mlp_size=48, max_length=24, qk_norm=True)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 61, (3, 20)))


logits = jax.jit(Transformer.__call__)
hidden = jax.jit(Transformer.hidden, static_argnames="noised")
CAUSAL = AttentionMask.causal()


@functools.cache
def build(config, **settings):
    return random_model(lambda: Transformer(config, rngs=nnx.Rngs(0), **settings))


@pytest.mark.parametrize("config", [GPT2, QWEN3], ids=["gpt2", "qwen3"])
def test_causal_logits_ignore_the_future_and_bidirectional_do_not(config):
    model, changed = build(config), TOKENS.at[:, 12].add(1)
    difference = lambda mask: jnp.abs(  # noqa: E731
        logits(model, TOKENS, mask) - logits(model, changed, mask)).max(axis=(0, 2))
    assert (difference(CAUSAL)[:12] == 0).all()
    assert (difference(AttentionMask.bidirectional()) > 0).all()


@pytest.mark.parametrize("config", [GPT2, QWEN3], ids=["gpt2", "qwen3"])
def test_every_parameter_has_a_gradient_and_axes(config):
    grads = jax.jit(jax.grad(lambda m: jnp.sum(m(TOKENS, CAUSAL) * jnp.arange(61.0))))(build(config))
    for path, grad in nnx.to_flat_state(nnx.state(grads)):
        assert len(grad.axes) == grad[...].ndim, path
        is_key_bias = "k" in path and "bias" in path  # softmax does not see a constant added to all scores
        assert is_key_bias or jnp.abs(grad[...]).max() > 0, path


def test_dropout_is_per_example_and_needs_seeds():
    model, seeds = build(GPT2), jnp.array([4, 5, 6], jnp.uint32)
    everything = hidden(model, TOKENS, CAUSAL, dropout_seeds=seeds)
    fewer = hidden(model, TOKENS[:0:-1], CAUSAL, dropout_seeds=seeds[:0:-1])
    np.testing.assert_allclose(everything[:0:-1], fewer, atol=1e-5)
    plain = hidden(model, TOKENS, CAUSAL)
    assert jnp.abs(everything - plain).max() > 0.01


def test_bfloat16_compute_gives_float32_logits():
    model = build(QWEN3, compute=Compute(dtype="bfloat16"))
    found = logits(model, TOKENS, CAUSAL)
    assert found.dtype == jnp.float32 and model.embed.embedding[...].dtype == jnp.float32
    np.testing.assert_allclose(found, logits(build(QWEN3), TOKENS, CAUSAL), atol=0.05)


@pytest.mark.parametrize("config, mask", [(GPT2, CAUSAL), (QWEN3, AttentionMask.block_diffusion(4, 10))],
                         ids=["gpt2, causal", "qwen3, blocks"])
def test_bfloat16_gradients(config, mask):
    """Of both kinds of product, within the same bound of float32's, relative to each parameter's largest."""
    def gradients(**compute):
        model = build(config, compute=Compute(**compute))
        loss = lambda m: jnp.mean(jax.nn.logsumexp(m(TOKENS, mask) * 4, axis=-1))  # noqa: E731
        return dict(nnx.to_flat_state(nnx.state(jax.jit(jax.grad(loss))(model))))

    reference = gradients()
    for matmul in ("default", "cpu_bfloat16"):
        for path, gradient in gradients(dtype="bfloat16", matmul=matmul).items():
            assert gradient[...].dtype == jnp.float32
            exact = np.asarray(reference[path][...])
            error = np.abs(np.asarray(gradient[...]) - exact).max() / (np.abs(exact).max() + 1e-3)
            assert error < 0.1, (matmul, path)


@pytest.mark.parametrize("config", [GPT2, QWEN3], ids=["gpt2", "qwen3"])
def test_single_row_of_cpu_products(config):
    """Its products are padded."""
    fast, default = (build(config, compute=Compute("bfloat16", matmul=kind)) for kind in ("cpu_bfloat16", "default"))
    one = TOKENS[:1, :1]
    np.testing.assert_allclose(logits(fast, one, CAUSAL), logits(default, one, CAUSAL), atol=0.02)


def test_given_positions():
    segments = jnp.asarray([[0] * 8 + [1] * 12] * 3)
    positions = jnp.concatenate([jnp.arange(8), jnp.arange(12)])
    packed = logits(build(GPT2), TOKENS, CAUSAL.with_segments(segments), positions=positions)
    np.testing.assert_allclose(packed[:, 8:], logits(build(GPT2), TOKENS[:, 8:], CAUSAL), atol=1e-5)


def test_sliding_window():
    model = build(dataclasses.replace(QWEN3, sliding_window=4, num_layers=1))
    moved = logits(model, TOKENS, CAUSAL) - logits(model, TOKENS.at[:, 5].add(1), CAUSAL)
    np.testing.assert_array_equal(np.flatnonzero(jnp.abs(moved).max(axis=(0, 2)) > 0), [5, 6, 7, 8])


def test_sequence_past_the_learned_positions_is_refused():
    with pytest.raises(ConfigError, match="30.*24"):
        abstract_model(GPT2)(jnp.zeros((1, 30), int), CAUSAL)


def test_abstract_model_has_the_shapes_of_a_real_one():
    shapes = lambda m: [(path, leaf.shape, leaf.dtype) for path, leaf in nnx.to_flat_state(nnx.state(m))]  # noqa: E731
    assert shapes(abstract_model(QWEN3)) == shapes(build(QWEN3))
