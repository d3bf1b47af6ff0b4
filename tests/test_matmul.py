"""Products of the fast kind: their values and gradients, what XLA makes of them, and where they are chosen."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dlm_jax.attention import AttentionMask
from dlm_jax.matmul import (
    FAST,
    add_bias,
    choose_matmul,
    dense,
    has_bfloat16_units,
    jit_model,
    matmul,
    product,
    resolve_dtype,
)
from dlm_jax.models import Compute, ModelConfig, Transformer

DENSE = {"matrix": ((5, 8, 48), (48, 64), 1), "to heads": ((5, 8, 48), (48, 4, 16), 1),
         "from heads": ((5, 8, 4, 12), (4, 12, 32), 2)}


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def assert_near(value, reference):
    """bfloat16 has 8 bits: a rounded result is within 2^-8 of the exact one, relative to the largest."""
    value, reference = np.asarray(value, np.float32), np.asarray(reference, np.float32)
    assert value.shape == reference.shape
    assert np.abs(value - reference).max() <= 2**-7 * np.abs(reference).max()


def value_and_gradients(function, *arrays):
    value, pull = jax.vjp(function, *arrays)
    return value, *pull(normal(9, *value.shape).astype(value.dtype))


def exact(arrays):
    return [array.astype(jnp.float32) for array in arrays]


@pytest.mark.parametrize(("x", "kernel", "num_inputs"), DENSE.values(), ids=DENSE)
def test_dense(x, kernel, num_inputs):
    arrays = normal(0, *x), normal(1, *kernel)
    fast = value_and_gradients(lambda x, kernel: dense(x, kernel, num_inputs, FAST), *arrays)
    plain = value_and_gradients(lambda x, kernel: dense(x, kernel, num_inputs, "default"), *exact(arrays))
    for one, other in zip(fast, plain, strict=True):
        assert one.dtype == jnp.bfloat16
        assert_near(one, other)


@pytest.mark.parametrize("transpose_b", [False, True])
def test_matmul(transpose_b):
    arrays = normal(0, 2, 3, 16, 32), normal(1, 2, 3, *((24, 32) if transpose_b else (32, 24)))
    run = lambda kind: lambda a, b: matmul(a, b, kind, transpose_b=transpose_b)  # noqa: E731
    fast, plain = value_and_gradients(run(FAST), *arrays), value_and_gradients(run("default"), *exact(arrays))
    assert fast[0].dtype == jnp.float32
    for one, other in zip(fast, plain, strict=True):
        assert_near(one, other)


def test_add_bias():
    arrays = normal(0, 6, 10, 4, 8), normal(1, 4, 8)
    fast = value_and_gradients(lambda y, bias: add_bias(y, bias, FAST), *arrays)
    plain = value_and_gradients(lambda y, bias: add_bias(y, bias, "default"), *exact(arrays))
    for one, other in zip(fast, plain, strict=True):
        assert_near(one, other)


@pytest.mark.parametrize("axes", [(-1, -2), (-1, -1), (-2, -2), (-2, -1)])
def test_product_axes(axes):
    a, b = normal(0, 2, 32, 32), normal(1, 2, 32, 32)
    reference = np.einsum({-1: "bij", -2: "bji"}[axes[0]] + {-2: ",bjk", -1: ",bkj"}[axes[1]] + "->bik",
                          *map(np.asarray, exact((a, b))))
    for kind in (FAST, "default"):
        np.testing.assert_allclose(product(a, b, *axes, kind), reference, rtol=1e-5, atol=1e-4)


def test_float32_is_untouched():
    x, kernel = jnp.ones((3, 4)), jnp.ones((4, 5))
    text = lambda kind: str(jax.make_jaxpr(lambda x, w: dense(x, w, 1, kind))(x, kernel))  # noqa: E731
    assert text(FAST) == text("default")


@pytest.mark.skipif(not has_bfloat16_units(), reason="XLA uses bfloat16 products only where the processor has them")
def test_compiled_products_take_bfloat16():
    """Forward and backward, none of them converts its operands to float32."""
    x, kernel = normal(0, 128, 256), normal(1, 256, 4, 64)

    def loss(x, kernel):
        y = dense(x.reshape(128, 256) * 2, kernel, 1, FAST).reshape(1, 128, 4, 64).transpose(0, 2, 1, 3)
        return jnp.sum(matmul(y, y * 2, FAST, transpose_b=True))

    text = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(x, kernel).compile().as_text()
    products = re.findall(r"\bdot\(%([\w.\-]+), %([\w.\-]+)\)", text)
    types = dict(re.findall(r"%([\w.\-]+) = (\w+)\[", text))
    assert len(products) >= 5
    assert {types[name] for pair in products for name in pair} == {"bf16"}


@pytest.mark.skipif(not has_bfloat16_units(), reason="XLA uses bfloat16 products only where the processor has them")
def test_no_float32_copy_of_all_kernels():
    config = ModelConfig("llama", vocab_size=64, hidden_size=32, num_layers=5, num_heads=2, num_kv_heads=2, head_dim=16,
                         mlp_size=96, max_length=64)
    model = Transformer(config, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16, compute=Compute("bfloat16", matmul=FAST))

    def hidden(graphdef, params, tokens):
        return nnx.merge(graphdef, params).hidden(tokens, AttentionMask.causal())

    program = jit_model(hidden, static_argnames="graphdef").program(FAST)
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        text = program.lower(*nnx.split(model), jnp.zeros((2, 8), int)).compile().as_text()
    finally:
        jax.config.update("jax_disable_most_optimizations", True)
    assert "bf16[5,32,96]" in text
    assert not re.findall(r"= f32\[5,32,96\]\S* (?:fusion|parameter)\(.*", text)


@pytest.mark.parametrize("kind", ["default", FAST])
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_plain_products_on_other_platforms(platform, kind):
    """The default kind leaves layouts to the compiler, forward and backward."""
    config = ModelConfig("qwen2", vocab_size=64, hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=16,
                         mlp_size=64, max_length=64, qkv_bias=True)
    compute = Compute("bfloat16", attention="xla", matmul=kind)
    graphdef, params = nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0), compute=compute)))

    def loss(params, tokens):
        return nnx.merge(graphdef, params)(tokens, AttentionMask.causal()).sum()

    traced = jax.jit(jax.grad(loss)).trace(params, jnp.zeros((2, 8), int))
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert "dot_general" in text and ("custom_call" in text) == ("LayoutConstraint" in text) == (kind == FAST)


def test_limited_instructions(monkeypatch):
    """XLA_FLAGS can keep XLA from instructions that the processor has."""
    def units(flags):
        monkeypatch.setenv("XLA_FLAGS", flags)
        return has_bfloat16_units.__wrapped__()

    assert not units("--xla_cpu_max_isa=AVX2")
    assert units("--xla_cpu_max_isa=AMX") == units("--xla_cpu_max_isa=AVX2 --xla_cpu_max_isa=avx512_bf16") == units("")


def test_choice():
    fast = has_bfloat16_units()
    assert choose_matmul("bfloat16", "cpu", 1) == (FAST if fast else "default")
    assert choose_matmul("float32", "cpu", 1) == choose_matmul("bfloat16", "cpu", 8) == "default"
    assert choose_matmul("bfloat16", "tpu", 1) == choose_matmul("bfloat16", "gpu", 1) == "default"
    assert resolve_dtype("auto", "cpu", 1) == ("bfloat16" if fast else "float32")
    assert resolve_dtype("auto", "cpu", 8) == "float32"
    assert resolve_dtype("auto", "tpu", 256) == resolve_dtype("bfloat16", "cpu", 8) == "bfloat16"
    assert resolve_dtype("float32", "gpu", 1) == "float32"
