"""LoRA and DoRA on full and quantized kernels: initial factors, training, merging, storage."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from flax import nnx

from dlm_jax.attention import AttentionMask
from dlm_jax.errors import ConfigError
from dlm_jax.models import (
    Compute,
    LoRAConfig,
    LoRAFactor,
    LoRAParam,
    abstract_model,
    add_lora,
    base_shapes,
    fingerprint,
    freeze_base,
    init_lora_factors,
    layers,
    merge_lora,
    split_lora,
    split_trainable,
)
from dlm_jax.models.lora import LoRAInputs, dequantize, quantize_kernel
from dlm_jax.parallel import MeshConfig, make_mesh, param_shardings
from tests.models.test_transformer import GPT2 as DROPPING_GPT2
from tests.models.test_transformer import QWEN3, TOKENS, hidden
from tests.models.test_transformer import build as build_base
from tests.models.test_transformer import logits as transformer_logits

ONE_DEVICE = jax.sharding.SingleDeviceSharding(jax.devices()[0])
LORA = LoRAConfig(rank=4, alpha=6.0, frozen_dtype="float32")
CODES = {"int8": jnp.int8, "nf4": jnp.uint4}
GPT2 = dataclasses.replace(DROPPING_GPT2, embed_dropout=0.0, attention_dropout=0.0, residual_dropout=0.0)
CASES = {"gpt2": (GPT2, ("q", "k", "v", "out", "up", "down")), "qwen3": (QWEN3, LORA.targets)}


@functools.cache
def build(case, **changes):
    """Returns a base, and the same with LoRA."""
    config, targets = CASES[case]
    lora = dataclasses.replace(LORA, **{"targets": targets} | changes)
    return build_base(config), add_lora(build_base(config), lora, 0, "float32")


def with_noise(model, seed=1):
    """Returns the model with random noise added to its factors."""
    graphdef, factors, rest = nnx.split(model, LoRAFactor, ...)
    keys = iter(jax.random.split(jax.random.key(seed), 99))
    factors = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), factors)
    return nnx.merge(graphdef, factors, rest)


def logits(model):
    return transformer_logits(model, TOKENS, AttentionMask.bidirectional())


def assert_merges(model, base):
    """Merges trained factors, compares the logits, and returns the merged model."""
    assert jnp.abs(logits(model) - logits(base)).max() > 0.1
    merged = merge_lora(model, "float32")
    assert nnx.graphdef(merged) == nnx.graphdef(base)
    np.testing.assert_allclose(logits(merged), logits(model), atol=2e-5)
    return merged


@pytest.mark.parametrize("case", CASES)
def test_new_factors_are_exact_and_trained_ones_merge(case):
    base, model = build(case)
    np.testing.assert_array_equal(logits(model), logits(base))
    model = with_noise(model)
    merged = assert_merges(model, base)
    # one layer of one projection, by numpy
    q, layer = model.blocks.attention.q, 1
    product = np.einsum("dr,rhk->dhk", q.factors.a[...][layer], q.factors.b[...][layer]) * 6.0 / 4
    np.testing.assert_allclose(merged.blocks.attention.q.kernel[...][layer],
                               base.blocks.attention.q.kernel[...][layer] + product, atol=1e-6)
    np.testing.assert_array_equal(merged.embed.embedding[...], base.embed.embedding[...])


@pytest.mark.parametrize("targets", [("out",), ("down", "k")])
def test_every_target_has_factors_that_matter(targets):
    base, model = build("qwen3", targets=targets)
    _, _, factors = split_lora(model)
    assert {path[-3] for path, _ in nnx.to_flat_state(factors)} == set(targets)
    for path, _ in nnx.to_flat_state(factors):
        if path[-1] == "b":
            graphdef, state = nnx.split(model)
            flat = dict(nnx.to_flat_state(state))
            flat[path] = flat[path].replace(flat[path][...] + 0.1)
            assert jnp.abs(logits(nnx.merge(graphdef, nnx.from_flat_state(flat))) - logits(base)).max() > 1e-3, path


def test_initial_factors_are_kaiming_uniform_by_seed():
    config = dataclasses.replace(GPT2, hidden_size=64, mlp_size=256, num_layers=6)
    lora = dataclasses.replace(LORA, rank=8, targets=CASES["gpt2"][1])
    factors, repeated, other = (dict(nnx.to_flat_state(init_lora_factors(config, lora, seed, "float32", ONE_DEVICE)))
                             for seed in (0, 0, 1))
    for path, value in factors.items():
        assert np.array_equal(value[...], repeated[path][...])
        if path[-1] == "b":
            assert not value[...].any()
            continue
        inputs = math.prod(value.shape[1:-1])
        bound = math.sqrt(6 / ((1 + 5) * inputs))  # Kaiming's, with the slope sqrt(5)
        assert 0.99 * bound < jnp.abs(value[...]).max() <= bound
        assert abs(float(jnp.std(value[...])) / (bound / math.sqrt(3)) - 1) < 0.05
        assert not np.array_equal(value[...], other[path][...])
    firsts = [np.asarray(value[...]).ravel()[:8] for path, value in factors.items() if path[-1] == "a"]
    assert len({tuple(np.round(first / np.abs(first).max(), 5)) for first in firsts}) == len(firsts)


def test_scale():
    assert LORA.scale == 1.5 and dataclasses.replace(LORA, rslora=True).scale == 3.0


def test_split_trainable_and_frozen_dtypes():
    config = dataclasses.replace(QWEN3, tie_embeddings=False)
    lora = dataclasses.replace(LORA, embedding=True, frozen_dtype="bfloat16")
    _, trained, frozen = split_trainable(abstract_model(config, Compute(), "float32", lora))
    names = {".".join(path) for path, _ in nnx.to_flat_state(trained)}
    assert "embed.embedding" in names and "head.kernel" not in names and len(names) == 1 + 2 * 7
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(trained))
    for path, leaf in nnx.to_flat_state(frozen):
        assert leaf.dtype == (jnp.float32 if path[-1] == "scale" else jnp.bfloat16), path
    _, trained, _ = split_trainable(abstract_model(config, lora=dataclasses.replace(lora, embedding=False, head=True)))
    assert isinstance(trained["head"]["kernel"], LoRAParam) and "embed" not in trained
    _, params, rest = split_trainable(abstract_model(config))
    assert len(jax.tree.leaves(params)) == len(jax.tree.leaves(nnx.state(abstract_model(config))))
    assert not jax.tree.leaves(rest)


def test_frozen_kernels_get_no_gradient():
    """No product in the backward pass has a kernel's shape; the gradient of all parameters has one of each."""
    _, model = build("gpt2")
    graphdef, trained, frozen = split_trainable(with_noise(model))
    shapes = {leaf.shape[1:] for path, leaf in nnx.to_flat_state(frozen) if path[-1] == "kernel"}

    def products(by_all):
        def loss(trained, frozen):
            return nnx.merge(graphdef, trained, frozen).hidden(TOKENS, AttentionMask.causal()).sum()

        jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1) if by_all else 0))(trained, frozen)
        found = set()

        def visit(jaxpr):
            for equation in jaxpr.eqns:
                if equation.primitive.name == "dot_general":
                    found.add(tuple(sorted(equation.outvars[0].aval.shape)))
                for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
                    inner = getattr(inner, "jaxpr", inner)
                    if hasattr(inner, "eqns"):
                        visit(inner)

        visit(jaxpr.jaxpr)
        return {shape for shape in shapes if tuple(sorted(shape)) in found}

    assert products(by_all=True) == shapes
    assert products(by_all=False) == set()


def test_dropout_of_factors():
    model, seeds = with_noise(build("gpt2", dropout=0.5)[1]), jnp.array([4, 5, 6], jnp.uint32)
    everything = hidden(model, TOKENS, AttentionMask.causal(), dropout_seeds=seeds)
    reversed_rows = hidden(model, TOKENS[::-1], AttentionMask.causal(), dropout_seeds=seeds[::-1])
    np.testing.assert_allclose(everything, reversed_rows[::-1], atol=1e-5)
    assert jnp.abs(everything - hidden(model, TOKENS, AttentionMask.causal())).max() > 0.01
    q = model.blocks.attention.q.factors
    one = nnx.merge(*nnx.split(q))
    one.a, one.b = nnx.Param(q.a[...][0]), nnx.Param(q.b[...][0])
    seeds = LoRAInputs(jnp.arange(2000, dtype=jnp.uint32))
    dropped, plain = one(jnp.ones((2000, 1, 32)), 0.0, seeds), one(jnp.ones((1, 1, 32)), 0.0, LoRAInputs())
    np.testing.assert_allclose(dropped.mean(0), plain[0], atol=0.15)
    assert jnp.abs(dropped[0] - plain[0]).max() > 0.2


@pytest.mark.parametrize("case", CASES)
def test_dora_norms_initial_and_merged(case):
    base, model = build(case, dora=True)
    out, kernel = model.blocks.attention.out, base.blocks.attention.out.kernel[...]
    np.testing.assert_allclose(out.factors.magnitude[...], np.linalg.norm(kernel.reshape(len(kernel), -1, 32), axis=1),
                               rtol=1e-5)
    np.testing.assert_allclose(logits(model), logits(base), atol=2e-5)
    model = with_noise(model)
    merged = assert_merges(model, base)
    norms = np.linalg.norm(merged.blocks.attention.out.kernel[...].reshape(len(kernel), -1, 32), axis=1)
    np.testing.assert_allclose(norms, np.abs(model.blocks.attention.out.factors.magnitude[...]), rtol=1e-5)


def test_dora_gradient_ignores_the_divisor():
    factors = with_noise(build("gpt2", dora=True)[1]).blocks.mlp.down.factors
    for name in ("a", "b", "magnitude"):
        setattr(factors, name, nnx.Param(getattr(factors, name)[...][0]))
    graphdef, values = nnx.split(factors)
    kernel, x = (jax.random.normal(jax.random.key(i), shape)
                 for i, shape in enumerate(((factors.a.shape[0], 32), (5, factors.a.shape[0]))))

    def projected(values):
        factors = nnx.merge(graphdef, values)
        return factors.apply_dora_scale(factors(x, x @ kernel, LoRAInputs()), kernel)

    norms = jnp.linalg.norm(kernel + 1.5 * factors.a[...] @ factors.b[...], axis=0)

    def with_constants(values):
        return x @ (kernel + 1.5 * values["a"][...] @ values["b"][...]) * values["magnitude"][...] / norms

    found, expected = (jax.grad(lambda values, f: jnp.sin(f(values)).sum())(values, f)
                       for f in (projected, with_constants))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, expected)


@pytest.mark.parametrize("changes, message", [
    ({"rank": 33}, "lora.rank.*'q'"), ({"rank": 25, "targets": ("k",)}, "lora.rank.*'k'"),
    ({"rank": 0}, "lora.rank"), ({"alpha": 0.0}, "lora.alpha"), ({"dropout": 1.0}, "lora.dropout"),
    ({"targets": ("q", "qq")}, "lora.targets qq"), ({"targets": ()}, "lora.targets"),
    ({"frozen_dtype": "int4"}, "int4"), ({"head": True}, "lora.embedding")])
def test_refused_configs(changes, message):
    config = dataclasses.replace(QWEN3, tie_embeddings=True)
    with pytest.raises(ConfigError, match=message) as caught:
        abstract_model(config, lora=dataclasses.replace(LORA, **changes))
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="gate"):
        abstract_model(GPT2, lora=LORA)


def distance(x, kind):
    """Returns each value's distance to the nearest level of its block of 64 rows; `x` [rows, columns]."""
    if kind == "nf4":  # quantiles of the normal distribution, an exact zero, one level more above it (arXiv 2305.14314)
        above, below = (scipy.stats.norm.ppf(np.linspace(0.9677083, 0.5, n)[:-1]) for n in (9, 8))
        levels = np.sort(np.concatenate([above, -below, [0.0]])) / above.max()
    else:
        levels = np.arange(-128, 128) / 127.5
    blocks = x.reshape(-1, 64, x.shape[1])
    largest = np.abs(blocks).max(1, keepdims=True)
    return (np.abs((blocks / largest)[..., None] - levels).min(-1) * largest).reshape(x.shape)


@pytest.mark.parametrize("kind", CODES)
def test_codes_are_the_nearest_levels(kind):
    x = np.random.default_rng(0).normal(size=(2, 5, 128)).astype(np.float32)
    codes, scales = quantize_kernel(nnx.Param(jnp.asarray(x), axes=("layers", "mlp", "embed")), kind)
    assert codes.shape == x.shape and codes.dtype == CODES[kind] and codes.axes == ("layers", "mlp", "embed")
    assert scales.shape == (2, 5, 2) and scales.dtype == jnp.float32
    assert scales.axes == ("layers", "mlp", "embed_blocks")
    expected = np.stack([distance(layer.T.astype(np.float64), kind).T for layer in x])
    np.testing.assert_allclose(np.abs(dequantize(codes[...], scales[...]) - x), expected, atol=1e-5)


@pytest.mark.parametrize("size, blocks", [(192, 3), (100, 2), (67, 67)])
def test_quantization_blocks_divide_any_size(size, blocks):
    x = jax.random.normal(jax.random.key(0), (1, size, 3))
    codes, scales = quantize_kernel(nnx.Param(x, axes=("layers", "embed", "mlp")), "int8")
    assert scales.shape == (1, blocks, 3)
    np.testing.assert_allclose(dequantize(codes[...], scales[...]), x, atol=float(jnp.abs(x).max()) / 127)


@pytest.mark.parametrize("kind, case", [("int8", "gpt2"), ("nf4", "qwen3")])
def test_quantized_model_computes_with_dequantized_kernels(kind, case):
    base, model = build(case, frozen_dtype=kind)
    assert_merges(with_noise(model), base)
    kernel = base.blocks.mlp.down.kernel[...]
    rounded = dequantize(model.blocks.mlp.down.kernel[...], model.blocks.mlp.down.kernel_scale[...])
    error = jnp.linalg.norm(rounded - kernel) / jnp.linalg.norm(kernel)
    low, high = {"int8": (0.003, 0.008), "nf4": (0.06, 0.1)}[kind]  # blocks of 32 of a normal distribution
    assert low < error < high


@pytest.mark.parametrize("kind", CODES)
def test_only_kernels_of_blocks_are_codes(kind):
    config = dataclasses.replace(QWEN3, tie_embeddings=False)
    lora = dataclasses.replace(LORA, targets=("q",), frozen_dtype=kind)
    _, trained, frozen = split_trainable(abstract_model(config, Compute(), "float32", lora))
    assert {path[-1] for path, _ in nnx.to_flat_state(trained)} == {"a", "b"}
    for path, leaf in nnx.to_flat_state(frozen):
        table = path[-1] in ("kernel", "embedding")
        kernel = path[0] == "blocks" and path[-1] == "kernel"
        assert leaf.dtype == (CODES[kind] if kernel else jnp.bfloat16 if table else jnp.float32), path


@pytest.mark.parametrize("kind", ["bfloat16", "nf4"])
def test_cpu_products(kind):
    """Factors and frozen kernels stored as they are and as codes, beside the default products, both in bfloat16."""
    _, model = build("qwen3", frozen_dtype=kind)
    state = nnx.state(with_noise(model))

    def gradients(matmul):
        compute = Compute("bfloat16", matmul=matmul)
        graphdef = nnx.graphdef(abstract_model(model.config, compute, "float32", model.lora))
        graphdef, trained, frozen = split_trainable(nnx.merge(graphdef, state))
        loss = lambda trained: jnp.mean(nnx.merge(graphdef, trained, frozen).hidden(  # noqa: E731
            TOKENS, AttentionMask.causal()).astype(jnp.float32) * jnp.cos(jnp.arange(32.0)))
        return jax.tree.leaves(jax.jit(jax.grad(loss))(trained))

    for fast, default in zip(gradients("cpu_bfloat16"), gradients("default"), strict=True):
        assert np.abs(fast - default).max() < 0.05 * np.abs(default).max()


@pytest.mark.parametrize("kind", CODES)
def test_quantized_gradients_match_and_save_no_kernel(kind):
    base, model = build("qwen3", frozen_dtype=kind)
    plain = add_lora(merge_lora(model, "float32"), dataclasses.replace(model.lora, frozen_dtype="float32"), 0,
                     "float32")

    def gradient(model):
        graphdef, trained, frozen = split_trainable(with_noise(model))

        def loss(trained, frozen):
            return (nnx.merge(graphdef, trained, frozen).hidden(TOKENS, AttentionMask.causal()) ** 2).mean()

        jaxpr = jax.make_jaxpr(jax.grad(loss))(trained, frozen)
        forward = next(equation for equation in jaxpr.eqns if equation.primitive.name == "scan")
        return jax.jit(jax.grad(loss))(trained, frozen), [out.aval.shape for out in forward.outvars]

    (found, saved), (expected, _) = gradient(model), gradient(plain)
    for (path, a), (_, b) in zip(nnx.to_flat_state(found), nnx.to_flat_state(expected), strict=True):
        np.testing.assert_allclose(a[...], b[...], atol=1e-5, err_msg=str(path))
    kernels = {leaf.shape for path, leaf in nnx.to_flat_state(nnx.state(base)) if path[-1] == "kernel"}
    assert len(saved) > 5 and not kernels & set(saved)


@pytest.mark.parametrize("kind", CODES)
def test_split_kernels_are_dequantized_without_communication(kind):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    config = dataclasses.replace(QWEN3, hidden_size=128)  # two blocks
    full = nnx.state(build_base(config))
    lora = dataclasses.replace(LORA, frozen_dtype=kind)
    _, shapes = base_shapes(config, Compute(), "float32", lora)
    params = [(path, shape.replace(value[...].astype(shape.dtype)))
              for (path, shape), (_, value) in zip(nnx.to_flat_state(shapes), nnx.to_flat_state(full), strict=True)]
    expected, originals = freeze_base(params, lora)
    read = nnx.from_flat_state(params)
    split, split_originals = freeze_base(nnx.to_flat_state(jax.device_put(read, param_shardings(read, mesh))), lora)
    assert originals == split_originals == (fingerprint(read),)
    jax.tree.map(np.testing.assert_array_equal, split, expected)
    placed = jax.device_put(expected, param_shardings(expected, mesh))
    for name, axis in (("q", 1), ("out", 3)):
        linear = placed["blocks"]["attention"][name]
        codes, scales = linear["kernel"][...], linear["kernel_scale"][...]
        assert codes.sharding.spec[axis] == scales.sharding.spec[axis] == ("fsdp", "context", "expert")
        assert scales.addressable_shards[0].data.size * 4 == scales.size
        program = dequantize.lower(codes, scales).compile().as_text()
        assert "all-" not in program and "collective" not in program
        np.testing.assert_array_equal(dequantize(codes, scales), dequantize(
            *(expected["blocks"]["attention"][name][part][...] for part in ("kernel", "kernel_scale"))))


def test_noised_lora_leaves_clean_positions_alone():
    """Bit for bit, where no noised position is seen; and at noised positions it is plain LoRA."""
    base, plain = build("qwen3")
    plain = with_noise(plain)
    gated = nnx.merge(nnx.graphdef(abstract_model(base.config, lora=dataclasses.replace(plain.lora, where="noised"))),
                      nnx.state(plain))
    causal = AttentionMask.causal()
    of_base, mixed = hidden(base, TOKENS, causal), hidden(gated, TOKENS, causal, noised=(5, TOKENS.shape[1]))
    np.testing.assert_array_equal(hidden(gated, TOKENS, causal), of_base)
    np.testing.assert_array_equal(mixed[:, :5], of_base[:, :5])
    assert jnp.abs(mixed[:, 5:] - of_base[:, 5:]).max() > 0.01
    everywhere = hidden(gated, TOKENS, causal, noised=(0, TOKENS.shape[1]))
    np.testing.assert_allclose(everywhere, hidden(plain, TOKENS, causal), atol=1e-5)


@pytest.mark.parametrize("frozen_dtype", ["float32", "int8"])
def test_gradient_of_noised_lora_needs_no_clean_positions(frozen_dtype, monkeypatch):
    """The same gradient as by plain differentiation, which also computes those of clean positions."""
    _, plain = build("qwen3", frozen_dtype=frozen_dtype)
    gated = abstract_model(plain.config, lora=dataclasses.replace(plain.lora, where="noised"))
    graphdef, factors, rest = nnx.split(nnx.merge(nnx.graphdef(gated), nnx.state(with_noise(plain))), LoRAParam, ...)
    length = TOKENS.shape[1] // 2

    def loss(factors, rest):
        states = nnx.merge(graphdef, factors, rest).hidden(
            TOKENS[:, : 2 * length], AttentionMask.block_diffusion(2, length), noised=(0, length))
        return jnp.sum(jnp.sin(states))

    def gradient():
        compiled = jax.jit(lambda *arguments: jax.grad(loss)(*arguments)).lower(factors, rest).compile()
        return compiled(factors, rest), compiled.cost_analysis()["flops"]

    found, flops = gradient()
    monkeypatch.setattr(layers, "project_frozen", lambda project, x, arrays, noised: project(x, *arrays))
    expected, all_flops = gradient()
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), found, expected)
    assert flops < all_flops


@pytest.mark.parametrize("settings", [dict(where="noised", dora=True), dict(where="noised", embedding=True),
                                      dict(where="noised", head=True), dict(draft_head=True), dict(where="masked")])
def test_noised_lora_refuses_what_changes_clean_text(settings):
    with pytest.raises(ConfigError, match="lora"):
        LoRAConfig(rank=2, alpha=4.0, **settings)
