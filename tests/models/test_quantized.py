"""Quantized kernels: the levels by another road, the model that they make, and what its backward pass keeps."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from flax import nnx

from dlm_jax.attention import AttentionMask
from dlm_jax.models import Compute, Transformer, abstract_model, add_lora, fingerprint, merge_lora, split_trainable
from dlm_jax.models.adapt import base_shapes, freeze_base
from dlm_jax.models.lora import dequantize, quantize_kernel
from dlm_jax.parallel import MeshConfig, make_mesh, param_shardings
from tests.models.test_lora import CASES, LORA, ONE_DEVICE, TOKENS, learned, logits
from tests.models.test_transformer import QWEN3

KINDS = ("int8", "nf4")
STORED = {"int8": jnp.int8, "nf4": jnp.uint4}


@functools.cache
def base_of(case):
    return Transformer(CASES[case][0], rngs=nnx.Rngs(0))


@functools.cache
def build(kind, case="qwen3"):
    """A base and the same quantized, with new factors beside it."""
    lora = dataclasses.replace(LORA, targets=CASES[case][1], frozen_dtype=kind)
    return base_of(case), add_lora(base_of(case), lora, 0, "float32", ONE_DEVICE)


def distance(x, kind):
    """How far each value is from the nearest level of its block of 64 rows; `x` [rows, columns]."""
    if kind == "nf4":  # quantiles of the normal distribution, an exact zero, one level more above it (arXiv 2305.14314)
        above, below = (scipy.stats.norm.ppf(np.linspace(0.9677083, 0.5, n)[:-1]) for n in (9, 8))
        levels = np.sort(np.concatenate([above, -below, [0.0]])) / above.max()
    else:
        levels = np.arange(-128, 128) / 127.5
    blocks = x.reshape(-1, 64, x.shape[1])
    largest = np.abs(blocks).max(1, keepdims=True)
    return (np.abs((blocks / largest)[..., None] - levels).min(-1) * largest).reshape(x.shape)


@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_the_nearest_levels_of_blocks_of_64_along_embed(kind):
    x = np.random.default_rng(0).normal(size=(2, 5, 128)).astype(np.float32)
    codes, scales = quantize_kernel(nnx.Param(jnp.asarray(x), axes=("layers", "mlp", "embed")), kind)
    assert codes.shape == x.shape and codes.dtype == STORED[kind] and codes.axes == ("layers", "mlp", "embed")
    assert scales.shape == (2, 5, 2) and scales.dtype == jnp.float32
    assert scales.axes == ("layers", "mlp", "embed_blocks")
    expected = np.stack([distance(layer.T.astype(np.float64), kind).T for layer in x])
    np.testing.assert_allclose(np.abs(dequantize(codes[...], scales[...]) - x), expected, atol=1e-5)


@pytest.mark.parametrize("size, blocks", [(64, 1), (192, 3), (100, 2), (16, 1), (67, 67)])
def test_blocks_divide_any_size(size, blocks):
    x = jax.random.normal(jax.random.key(0), (1, size, 3))
    codes, scales = quantize_kernel(nnx.Param(x, axes=("layers", "embed", "mlp")), "int8")
    assert scales.shape == (1, blocks, 3)
    np.testing.assert_allclose(dequantize(codes[...], scales[...]), x, atol=float(jnp.abs(x).max()) / 127)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_model_computes_with_dequantized_kernels(kind, case):
    base, model = build(kind, case)
    model = learned(model)
    merged = merge_lora(model, "float32")
    assert nnx.graphdef(merged) == nnx.graphdef(base)
    np.testing.assert_allclose(logits(model), logits(merged), atol=2e-5)
    kernel = base.blocks.mlp.down.kernel[...]
    rounded = dequantize(model.blocks.mlp.down.kernel[...], model.blocks.mlp.down.kernel_scale[...])
    error = jnp.linalg.norm(rounded - kernel) / jnp.linalg.norm(kernel)
    low, high = {"int8": (0.003, 0.008), "nf4": (0.06, 0.1)}[kind]  # blocks of 32 of a normal distribution
    assert low < error < high


@pytest.mark.parametrize("kind", KINDS)
def test_kernels_of_blocks_are_codes_and_everything_else_is_as_with_bfloat16(kind):
    config = dataclasses.replace(QWEN3, tie_embeddings=False)
    lora = dataclasses.replace(LORA, targets=("q",), frozen_dtype=kind)
    _, trained, frozen = split_trainable(abstract_model(config, Compute(), "float32", lora))
    assert {path[-1] for path, _ in nnx.to_flat_state(trained)} == {"a", "b"}
    for path, leaf in nnx.to_flat_state(frozen):
        table = path[-1] in ("kernel", "embedding")
        kernel = path[0] == "blocks" and path[-1] == "kernel"
        assert leaf.dtype == (STORED[kind] if kernel else jnp.bfloat16 if table else jnp.float32), path


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_beside_dequantized_kernels_and_keep_none_of_them(kind):
    base, model = build(kind)
    plain = add_lora(merge_lora(model, "float32"), dataclasses.replace(model.lora, frozen_dtype="float32"), 0,
                     "float32", ONE_DEVICE)

    def gradient(model):
        graphdef, trained, frozen = split_trainable(learned(model))

        def loss(trained, frozen):
            return (nnx.merge(graphdef, trained, frozen).hidden(TOKENS, AttentionMask.causal()) ** 2).mean()

        jaxpr = jax.make_jaxpr(jax.grad(loss))(trained, frozen)
        forward = next(equation for equation in jaxpr.eqns if equation.primitive.name == "scan")
        return jax.jit(jax.grad(loss))(trained, frozen), [out.aval.shape for out in forward.outvars]

    (found, kept), (expected, _) = gradient(model), gradient(plain)
    for (path, a), (_, b) in zip(nnx.to_flat_state(found), nnx.to_flat_state(expected), strict=True):
        np.testing.assert_allclose(a[...], b[...], atol=1e-5, err_msg=str(path))
    kernels = {leaf.shape for path, leaf in nnx.to_flat_state(nnx.state(base)) if path[-1] == "kernel"}
    assert len(kept) > 5 and not kernels & set(kept)


@pytest.mark.parametrize("kind", KINDS)
def test_split_kernels_are_dequantized_where_they_lie(kind):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    config = dataclasses.replace(QWEN3, hidden_size=128)  # two blocks
    whole = nnx.state(Transformer(config, rngs=nnx.Rngs(0)))
    lora = dataclasses.replace(LORA, frozen_dtype=kind)
    _, shapes = base_shapes(config, Compute(), "float32", lora)
    params = [(path, shape.replace(value[...].astype(shape.dtype)))
              for (path, shape), (_, value) in zip(nnx.to_flat_state(shapes), nnx.to_flat_state(whole), strict=True)]
    expected, marks = freeze_base(params, lora)
    read = nnx.from_flat_state(params)
    split, split_marks = freeze_base(nnx.to_flat_state(jax.device_put(read, param_shardings(read, mesh))), lora)
    assert marks == split_marks == (fingerprint(read),)
    jax.tree.map(np.testing.assert_array_equal, split, expected)
    placed = jax.device_put(expected, param_shardings(expected, mesh))
    for name, axis in (("q", 1), ("k", 1), ("out", 3)):
        linear = placed["blocks"]["attention"][name]
        codes, scales = linear["kernel"][...], linear["kernel_scale"][...]
        assert codes.sharding.spec[axis] == scales.sharding.spec[axis] == ("fsdp", "context")
        assert scales.addressable_shards[0].data.size * 4 == scales.size
        program = dequantize.lower(codes, scales).compile().as_text()
        assert "all-" not in program and "collective" not in program
        np.testing.assert_array_equal(dequantize(codes, scales), dequantize(
            *(expected["blocks"]["attention"][name][part][...] for part in ("kernel", "kernel_scale"))))
