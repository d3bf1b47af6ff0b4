"""The fused loss against the plain one with all logits: values, gradients, meshes, and the arrays that never exist."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from dlm_jax.diffusion import HeadPlan, NoisyBatch, loss_sums

B, L, D, V = 8, 12, 16, 37
KEYS = jax.random.split(jax.random.key(0), 4)
HIDDEN = jax.random.normal(KEYS[0], (B, L, D))
TABLE = jax.random.normal(KEYS[1], (40, D))
TOKENS = jax.random.randint(KEYS[2], (B, L), 0, V)
WEIGHTS = jax.random.uniform(KEYS[3], (B, L), minval=0.5, maxval=5)
MASKS = {
    "none": jnp.zeros((B, L), bool), "all": jnp.ones((B, L), bool), "one": jnp.zeros((B, L), bool).at[3, 5].set(True),
    "half": jax.random.bernoulli(KEYS[0], 0.5, (B, L)),
    "uneven": jnp.zeros((B, L), bool).at[2].set(True).at[3, 4:].set(True).at[7, 11].set(True),
}


def batch_of(loss_mask):
    return NoisyBatch(TOKENS, TOKENS, MASKS[loss_mask], jnp.ones((B, L), bool), WEIGHTS)


def plain(hidden, kernel, batch, vocab_axis, shift, softcap=None):
    """(loss, (nll, correct)) over the scored positions, from all logits."""
    logits = hidden @ (kernel.T if vocab_axis == 0 else kernel)
    logits = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
    targets, weights, loss_mask = batch.targets, batch.weights, batch.loss_mask
    if shift:
        logits, targets, weights, loss_mask = logits[:, :-1], targets[:, 1:], weights[:, 1:], loss_mask[:, 1:]
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
    total = lambda x: jnp.sum(jnp.where(loss_mask, x, 0))  # noqa: E731
    return total(weights * nll), (total(nll), total(logits.argmax(-1) == targets))


@functools.cache
def programs(plan, shift):
    """Jitted: the fused sums with gradients, the same without, and the plain ones."""
    def fused(hidden, kernel, batch):
        sums = loss_sums(hidden, kernel, plan, batch, shift=shift)
        return 2 * sums.loss, sums  # the incoming gradient is not 1

    differentiated = functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    reference = functools.partial(plain, vocab_axis=plan.vocab_axis, shift=shift,
                                  softcap=plan.softcap)
    return jax.jit(differentiated(fused)), jax.jit(fused), jax.jit(differentiated(reference))


def test_frozen_head_has_no_gradient():
    plan = HeadPlan(1, chunk_size=16)
    frozen = dataclasses.replace(plan, kernel_gradient=False)
    inputs = HIDDEN, TABLE[:V].T, batch_of("half")
    gradient = lambda plan: jax.jit(jax.grad(  # noqa: E731
        lambda h, k, b: loss_sums(h, k, plan, b).loss, argnums=(0, 1)))
    (dhidden, dkernel), (same, none) = gradient(plan)(*inputs), gradient(frozen)(*inputs)
    np.testing.assert_array_equal(dhidden, same)
    assert jnp.abs(dkernel).max() > 0 and not none.any()
    by_hidden = lambda plan: jax.make_jaxpr(jax.grad(lambda *x: loss_sums(*x[:2], plan, x[2]).loss))  # noqa: E731
    products = [str(by_hidden(p)(*inputs)).count("dot_general") for p in (plan, frozen)]
    assert products[0] * 2 == products[1] * 3  # the logits and their gradient by the hidden states


def check(plan, loss_mask, shift=True, vocab=V):
    """The fused sums and gradients are those of the plain loss."""
    fused, without, reference = programs(plan, shift)
    inputs = HIDDEN, TABLE[:vocab] if plan.vocab_axis == 0 else TABLE[:vocab].T, batch_of(loss_mask)
    (_, sums), grads = fused(*inputs)
    (loss, (nll, correct)), expected = reference(*inputs)
    np.testing.assert_allclose((sums.loss, sums.weighted_nll, sums.nll), (loss, loss, nll), rtol=1e-5)
    assert (sums.correct, sums.num_scored) == (correct, MASKS[loss_mask][:, int(shift):].sum())
    for found, reference in zip(grads, expected, strict=True):
        np.testing.assert_allclose(found, 2 * reference, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(jax.tree.leaves(without(*inputs)[1]), jax.tree.leaves(sums), rtol=1e-6)


@pytest.mark.parametrize("loss_mask", MASKS)
@pytest.mark.parametrize("vocab_axis, chunk_size", [(0, 1), (0, 10), (0, 500), (1, 10)])
def test_one_device(vocab_axis, loss_mask, chunk_size):
    check(HeadPlan(vocab_axis, chunk_size=chunk_size), loss_mask)


def test_without_the_shift():
    check(HeadPlan(0, chunk_size=10), "all", shift=False)


def test_soft_cap():
    check(HeadPlan(0, chunk_size=10, softcap=3.0), "half")
    check(mesh_plan((2, 2, 2, 1), 1, 40, softcap=3.0), "uneven", vocab=40)
    check(mesh_plan((2, 4, 1, 1), 0, V, max_gradient_bytes=4 * D * 7, softcap=3.0), "half")


def mesh_plan(sizes, vocab_axis, vocab, **kwargs):
    """Under the library's rules: rows over data and fsdp, length over context, embed over fsdp, vocab over tensor."""
    mesh = jax.make_mesh(sizes, ("data", "fsdp", "tensor", "context"), axis_types=(AxisType.Auto,) * 4)
    axes = ("tensor" if vocab % sizes[2] == 0 else None, "fsdp")
    kernel = PartitionSpec(*(axes if vocab_axis == 0 else axes[::-1]))
    return HeadPlan(vocab_axis, mesh, PartitionSpec(("data", "fsdp"), "context"), kernel, chunk_size=8, **kwargs)


@pytest.mark.parametrize("loss_mask", ["uneven", "none", "half"])
@pytest.mark.parametrize("sizes, vocab_axis, vocab", [
    ((1, 8, 1, 1), 1, V), ((2, 2, 2, 1), 1, 40), ((2, 1, 2, 2), 0, V), ((1, 2, 2, 2), 0, 40)], ids=str)
def test_meshes(sizes, vocab_axis, vocab, loss_mask):
    """Under "uneven" one device of eight scores all its positions and six score none."""
    check(mesh_plan(sizes, vocab_axis, vocab), loss_mask, vocab=vocab)


@pytest.mark.parametrize("sizes, vocab_axis, vocab, block", [
    ((2, 4, 1, 1), 0, V, 7), ((1, 2, 2, 2), 1, 40, 20)], ids=str)
def test_gradient_by_vocabulary_blocks(sizes, vocab_axis, vocab, block):
    plan = mesh_plan(sizes, vocab_axis, vocab, max_gradient_bytes=4 * D * block)
    for loss_mask in ("uneven", "half"):
        check(plan, loss_mask, vocab=vocab)


def test_bfloat16():
    hidden, plan, batch = HIDDEN.astype(jnp.bfloat16), HeadPlan(0), batch_of("half")
    run = lambda loss: jax.jit(jax.value_and_grad(loss, (0, 1)))  # noqa: E731
    value, grads = run(lambda h, k: loss_sums(h, k, plan, batch).loss)(hidden, TABLE)
    exact, expected = run(lambda h, k: plain(h, k, batch, 0, True)[0])(
        hidden.astype(jnp.float32), TABLE.astype(jnp.bfloat16).astype(jnp.float32))
    assert value.dtype == jnp.float32 and [g.dtype.name for g in grads] == ["bfloat16", "float32"]
    np.testing.assert_allclose(value, exact, rtol=1e-5)
    for found, reference in zip(grads, expected, strict=True):
        np.testing.assert_allclose(found.astype(jnp.float32), reference, rtol=0.02, atol=0.05)


def arrays(jaxpr, on_device):
    """Yields (type, shape) of every array of a program, or only of those inside `shard_map`: on one device."""
    for equation in jaxpr.eqns:
        if not on_device:
            yield from ((var.aval.dtype.name, var.aval.shape) for var in equation.outvars)
        for inner in jax.tree.leaves(tuple(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from arrays(inner, on_device and equation.primitive.name != "shard_map")


def arrays_of(plan, hidden):
    gradient = jax.value_and_grad(lambda h, k: loss_sums(h, k, plan, batch_of("half")).loss, (0, 1))
    return set(arrays(jax.make_jaxpr(gradient)(hidden, TABLE[:V]).jaxpr, on_device=plan.mesh is not None))


def test_all_logits_never_exist():
    shapes = arrays_of(HeadPlan(0, chunk_size=16), HIDDEN)
    assert ("float32", (16, V)) in shapes
    assert max(np.prod(shape) for _, shape in shapes) == B * L * D < B * L * V


def test_vocabulary_blocks_bound_the_gradient():
    """Each device of four gathers the head in bfloat16, and makes a float32 gradient of it or of a block of it."""
    for block_bytes, block in ((2**20, V), (4 * D * 10, 10)):
        plan = mesh_plan((2, 4, 1, 1), 0, V, max_gradient_bytes=block_bytes)
        shapes = arrays_of(plan, HIDDEN.astype(jnp.bfloat16))
        assert ("bfloat16", (V, D)) in shapes and ("float32", (V, D // 4)) in shapes
        assert [size for size in (V, 10) if ("float32", (size, D)) in shapes] == [block]
