"""LoRA in the layers: what is new computes what the base does, what is learned counts, and nothing else is touched."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dlm_jax.attention import AttentionMask
from dlm_jax.errors import ConfigError
from dlm_jax.models import (
    Compute,
    LoRAConfig,
    LoRAFactor,
    LoRAParam,
    Transformer,
    abstract_model,
    add_lora,
    init_lora_factors,
    merge_lora,
    split_lora,
    split_trainable,
)
from tests.models.test_transformer import GPT2, QWEN3

TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 61, (3, 20)))
ONE_DEVICE = jax.sharding.SingleDeviceSharding(jax.devices()[0])
LORA = LoRAConfig(rank=4, alpha=6.0, frozen_dtype="float32")
CASES = {"gpt2": (GPT2, ("q", "k", "v", "out", "up", "down")), "qwen3": (QWEN3, LORA.targets)}


def build(case, seed=0, base=None, **changes):
    """A base and the same with LoRA beside it."""
    config, targets = CASES[case]
    lora = dataclasses.replace(LORA, **{"targets": targets} | changes)
    base = base or Transformer(config, rngs=nnx.Rngs(0))
    return base, add_lora(base, lora, seed, "float32", ONE_DEVICE)


def learned(model, seed=1):
    """The model with factors b that are not zero."""
    graphdef, factors, rest = nnx.split(model, LoRAFactor, ...)
    keys = iter(jax.random.split(jax.random.key(seed), 99))
    factors = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), factors)
    return nnx.merge(graphdef, factors, rest)


def logits(model):
    return _logits(*nnx.split(model))


@functools.partial(jax.jit, static_argnums=0)
def _logits(graphdef, state):
    return nnx.merge(graphdef, state)(TOKENS, AttentionMask.bidirectional())


@pytest.mark.parametrize("case", CASES)
def test_new_factors_change_no_bit_and_learned_ones_are_what_merging_adds(case):
    base, model = build(case)
    np.testing.assert_array_equal(logits(model), logits(base))
    model = learned(model)
    assert jnp.abs(logits(model) - logits(base)).max() > 0.1
    merged = merge_lora(model, "float32")
    assert nnx.graphdef(merged) == nnx.graphdef(base)
    np.testing.assert_allclose(logits(merged), logits(model), atol=2e-5)
    # by another road: the product of one layer of one projection
    q, layer = model.blocks.attention.q, 1
    product = np.einsum("dr,rhk->dhk", q.factors.a[...][layer], q.factors.b[...][layer]) * 6.0 / 4
    np.testing.assert_allclose(merged.blocks.attention.q.kernel[...][layer],
                               base.blocks.attention.q.kernel[...][layer] + product, atol=1e-6)
    np.testing.assert_array_equal(merged.embed.embedding[...], base.embed.embedding[...])


@pytest.mark.parametrize("targets", [("q",), ("out",), ("down", "k")])
def test_only_targets_have_factors_and_all_of_them_matter(targets):
    base, model = build("qwen3", targets=targets)
    _, _, factors = split_lora(model)
    assert {path[-3] for path, _ in nnx.to_flat_state(factors)} == set(targets)
    for path, _ in nnx.to_flat_state(factors):
        if path[-1] == "b":
            graphdef, state = nnx.split(model)
            flat = dict(nnx.to_flat_state(state))
            flat[path] = flat[path].replace(flat[path][...] + 0.1)
            assert jnp.abs(logits(nnx.merge(graphdef, nnx.from_flat_state(flat))) - logits(base)).max() > 1e-3, path


def test_new_factors_are_kaiming_uniform_and_depend_on_the_seed_alone():
    config = dataclasses.replace(GPT2, hidden_size=64, mlp_size=256, num_layers=6)
    lora = dataclasses.replace(LORA, rank=8, targets=CASES["gpt2"][1])
    factors, remat, other = (dict(nnx.to_flat_state(init_lora_factors(config, lora, seed, "float32", ONE_DEVICE)))
                             for seed in (0, 0, 1))
    for path, value in factors.items():
        assert np.array_equal(value[...], remat[path][...])
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


def test_scale_by_rank_and_by_its_root():
    assert LORA.scale == 1.5 and dataclasses.replace(LORA, rslora=True).scale == 3.0


def test_what_is_trained_is_told_by_type_and_what_is_not_is_stored_small():
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


def test_gradients_by_factors_alone_make_no_gradient_of_a_kernel():
    """No product in the backward pass has a kernel's shape, where the gradient by everything has one of each."""
    _, model = build("gpt2")
    graphdef, trained, frozen = split_trainable(learned(model))
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


def test_dropout_of_factors_is_per_example_and_counts_on_average():
    base = Transformer(dataclasses.replace(GPT2, embed_dropout=0.0, attention_dropout=0.0, residual_dropout=0.0),
                       rngs=nnx.Rngs(0))
    model = learned(build("gpt2", base=base, dropout=0.5)[1])
    seeds = jnp.array([4, 5, 6], jnp.uint32)
    run = lambda rows, **seeded: model.hidden(TOKENS[rows], AttentionMask.causal(), **seeded)  # noqa: E731
    everything = run(np.arange(3), dropout_seeds=seeds)
    np.testing.assert_allclose(everything[2], run(np.array([2]), dropout_seeds=seeds[2:])[0], atol=1e-5)
    plain = run(np.arange(3))
    assert jnp.abs(everything - plain).max() > 0.01
    q = model.blocks.attention.q.factors
    one = nnx.merge(*nnx.split(q))
    one.a, one.b = nnx.Param(q.a[...][0]), nnx.Param(q.b[...][0])
    x = jnp.ones((2000, 1, 32))
    mean = one(x, jnp.arange(2000, dtype=jnp.uint32)).mean(0)
    np.testing.assert_allclose(mean, one(x[:1], None)[0], atol=0.15)
    assert jnp.abs(one(x[:1], seeds[:1]) - one(x[:1], None)).max() > 0.2


@pytest.mark.parametrize("case", CASES)
def test_dora_begins_at_the_norms_of_the_base_and_merges_to_the_norms_it_learned(case):
    base, model = build(case, dora=True)
    out, kernel = model.blocks.attention.out, base.blocks.attention.out.kernel[...]
    np.testing.assert_allclose(out.factors.magnitude[...], np.linalg.norm(kernel.reshape(len(kernel), -1, 32), axis=1),
                               rtol=1e-5)
    np.testing.assert_allclose(logits(model), logits(base), atol=2e-5)
    model = learned(model)
    assert jnp.abs(logits(model) - logits(base)).max() > 0.1
    merged = merge_lora(model, "float32")
    assert nnx.graphdef(merged) == nnx.graphdef(base)
    np.testing.assert_allclose(logits(merged), logits(model), atol=2e-5)
    norms = np.linalg.norm(merged.blocks.attention.out.kernel[...].reshape(len(kernel), -1, 32), axis=1)
    np.testing.assert_allclose(norms, np.abs(model.blocks.attention.out.factors.magnitude[...]), rtol=1e-5)


def test_doras_gradient_takes_the_norms_it_divides_by_as_constants():
    factors = learned(build("gpt2", dora=True)[1]).blocks.mlp.down.factors
    for name in ("a", "b", "magnitude"):
        setattr(factors, name, nnx.Param(getattr(factors, name)[...][0]))
    graphdef, values = nnx.split(factors)
    kernel, x = (jax.random.normal(jax.random.key(i), shape)
                 for i, shape in enumerate(((factors.a.shape[0], 32), (5, factors.a.shape[0]))))

    def projected(values):
        factors = nnx.merge(graphdef, values)
        return factors.apply_dora_scale(x @ kernel + factors(x, None), kernel)

    norms = jnp.linalg.norm(kernel + 1.5 * factors.a[...] @ factors.b[...], axis=0)

    def with_constants(values):
        return x @ (kernel + 1.5 * values["a"][...] @ values["b"][...]) * values["magnitude"][...] / norms

    found, expected = (jax.grad(lambda values, f: jnp.sin(f(values)).sum())(values, f)
                       for f in (projected, with_constants))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, expected)


@pytest.mark.parametrize("changes, message", [
    ({"rank": 33}, "lora.rank 33 is larger than the 32 inputs of the projection 'q'"),
    ({"rank": 25, "targets": ("k",)}, "lora.rank 25 is larger than the 24 outputs of the projection 'k'"),
    ({"rank": 0}, "must be positive"), ({"alpha": 0.0}, "must be positive"), ({"dropout": 1.0}, "lora.dropout"),
    ({"targets": ("q", "qq")}, "lora.targets qq"), ({"targets": ()}, "lora.targets"),
    ({"frozen_dtype": "int4"}, "int4"), ({"head": True}, "lora.embedding, which trains both")])
def test_what_cannot_be_is_refused_in_a_sentence(changes, message):
    config = dataclasses.replace(QWEN3, tie_embeddings=True)
    with pytest.raises(ConfigError, match=message) as caught:
        abstract_model(config, lora=dataclasses.replace(LORA, **changes))
    assert "\n" not in str(caught.value)


def test_a_gate_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match="no gated MLP"):
        abstract_model(GPT2, lora=LORA)
