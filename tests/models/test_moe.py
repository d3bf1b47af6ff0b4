"""Mixtures of experts: the definition token by token, the router's statistics, caches, LoRA."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from dlm_jax.errors import ConfigError
from dlm_jax.models import ExpertsConfig, LoRAConfig, LoRAFactor, ModelConfig, add_lora, merge_lora
from dlm_jax.models.moe import RouterSums, apply_experts, load_balancing_loss
from tests.models.test_layer_types import check_cached_rows
from tests.models.test_transformer import CAUSAL, TOKENS, build, logits

MOE = ModelConfig("qwen3_moe", vocab_size=61, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
                  mlp_size=16, max_length=24, qk_norm=True, experts=ExpertsConfig(4, 2, True, 0.01))
EMBED, WIDTH, EXPERTS, COUNT, K = 6, 5, 4, 17, 2
RNG = np.random.default_rng(0)
KERNELS = tuple(RNG.normal(size=shape).astype(np.float32) for shape in (
    (EXPERTS, EMBED, WIDTH), (EXPERTS, EMBED, WIDTH), (EXPERTS, WIDTH, EMBED)))
X, WEIGHTS = RNG.normal(size=(COUNT, EMBED)).astype(np.float32), RNG.uniform(size=(COUNT, K)).astype(np.float32)
ROUTES = {
    "even": np.stack([np.arange(COUNT) % EXPERTS, (np.arange(COUNT) + 1) % EXPERTS], axis=1),
    "random": np.stack([RNG.permutation(EXPERTS)[:K] for _ in range(COUNT)]),
    "all to one pair": np.broadcast_to([3, 1], (COUNT, K)),
}


def silu(x):
    return x / (1 + np.exp(-x))


def by_token(chosen, experts=range(EXPERTS)):
    """One expert of one token at a time, in float64."""
    gate, up, down = (kernel.astype(np.float64) for kernel in KERNELS)
    out = np.zeros((COUNT, EMBED))
    for token, slot in np.ndindex(COUNT, K):
        e = chosen[token, slot]
        if e in experts:
            out[token] += WEIGHTS[token, slot] * ((silu(X[token] @ gate[e]) * (X[token] @ up[e])) @ down[e])
    return out


@pytest.mark.parametrize("route", ROUTES)
def test_no_token_is_dropped(route):
    chosen = jnp.asarray(ROUTES[route])
    apply = jax.jit(apply_experts, static_argnums=4)
    found = apply(X, WEIGHTS, chosen, KERNELS, "silu")
    np.testing.assert_allclose(found, by_token(ROUTES[route]), atol=1e-5)
    parts = [apply(X, WEIGHTS, chosen, tuple(k[first : first + 2] for k in KERNELS), "silu", first)
             for first in (0, 2)]
    np.testing.assert_allclose(parts[1], by_token(ROUTES[route], experts=(2, 3)), atol=1e-5)
    np.testing.assert_allclose(sum(parts), found, atol=1e-5)


def test_load_balancing_loss_as_in_transformers():
    scores = RNG.normal(size=(40, EXPERTS)).astype(np.float32)
    probabilities = jax.nn.softmax(jnp.asarray(scores))
    chosen = jax.lax.top_k(probabilities, K)[1]
    counts = jnp.bincount(chosen.ravel(), length=EXPERTS).astype(jnp.float32)
    sums = RouterSums(counts[None], probabilities.sum(0)[None])
    expected = load_balancing_loss_func((torch.from_numpy(scores),), EXPERTS, K)
    np.testing.assert_allclose(load_balancing_loss(sums, K), expected, rtol=1e-6)
    even = RouterSums(jnp.full((3, EXPERTS), 20.0), jnp.full((3, EXPERTS), 10.0))
    np.testing.assert_allclose(load_balancing_loss(even, K), K)


def test_cached_rows_are_exact():
    check_cached_rows(MOE)


def test_lora_beside_quantized_experts():
    lora = LoRAConfig(2, 4.0, targets=("q", "k", "v", "out"), frozen_dtype="int8")
    model = add_lora(build(MOE), lora, 0, "float32")
    assert model.blocks.mlp.gate.kernel[...].dtype == jnp.int8
    graphdef, factors, rest = nnx.split(model, LoRAFactor, ...)
    model = nnx.merge(graphdef, jax.tree.map(lambda x: x + 0.1, factors), rest)
    assert jnp.abs(logits(model, TOKENS, CAUSAL) - logits(build(MOE), TOKENS, CAUSAL)).max() > 0.01
    np.testing.assert_allclose(logits(model, TOKENS, CAUSAL), logits(merge_lora(model, "float32"), TOKENS, CAUSAL),
                               atol=1e-4)
    with pytest.raises(ConfigError, match="gate.*experts"):
        build(MOE, lora=dataclasses.replace(lora, targets=("q", "gate")))


def test_more_choices_than_experts_are_refused():
    with pytest.raises(ConfigError, match="num_experts_per_tok"):
        ExpertsConfig(4, 5)
