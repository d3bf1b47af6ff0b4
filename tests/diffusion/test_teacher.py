"""Terms that compare with the parent: values and gradients against plain implementations, on each kind of mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from dlm_jax.diffusion import (
    HeadPlan,
    LossWeights,
    NoisyBatch,
    TeacherStates,
    align_states,
    hidden_distance,
    loss_sums,
)

B, L, D, V = 8, 12, 16, 40
KEYS = jax.random.split(jax.random.key(0), 8)
HIDDEN, PARENT = jax.random.normal(KEYS[0], (B, L, D)), jax.random.normal(KEYS[1], (B, L, D))
TABLE, PARENT_TABLE = jax.random.normal(KEYS[2], (V, D)) / 2, jax.random.normal(KEYS[3], (V, D)) / 2
PREDICTED = jnp.argmax(jnp.roll(HIDDEN, 1, axis=1) @ TABLE.T, axis=-1)
TOKENS = jnp.where(jax.random.bernoulli(KEYS[4], 0.5, (B, L)), PREDICTED, jax.random.randint(KEYS[4], (B, L), 0, V))
NOISABLE = jnp.arange(L) > 0
BATCH = NoisyBatch(TOKENS, TOKENS, jax.random.bernoulli(KEYS[5], 0.5, (B, L)) & NOISABLE,
                   jnp.broadcast_to(NOISABLE, (B, L)), jnp.ones((B, L)),
                   clean_mask=jax.random.bernoulli(KEYS[6], 0.4, (B, L)) & NOISABLE)
WEIGHTS = jax.random.uniform(KEYS[7], (B, L), minval=0.5, maxval=3)
FIELDS = {"kl": "distribution", "tv": "distribution", "confidence": "confidence", "clean": "clean"}


def weights_of(term):
    """Only one term counts."""
    return dataclasses.replace(LossWeights(jnp.zeros((B, L))), **{FIELDS[term]: WEIGHTS})


def plain(term, softcap, hidden, table):
    """The same from all logits."""
    cap = (lambda x: softcap * jnp.tanh(x / softcap)) if softcap else (lambda x: x)
    logits, parent = (jax.nn.log_softmax(cap(jnp.roll(x, 1, axis=1) @ kernel.T)) for x, kernel in (
        (hidden, table), (PARENT, PARENT_TABLE)))
    p, q = jnp.exp(logits), jnp.exp(parent)
    values = {
        "kl": jnp.sum(q * (parent - logits), axis=-1), "tv": 0.5 * jnp.abs(p - q).sum(axis=-1),
        "confidence": jnp.where(p.argmax(axis=-1) == TOKENS, -jnp.sum(p * logits, axis=-1), 0),
        "clean": -jnp.take_along_axis(logits, TOKENS[..., None], axis=-1)[..., 0]}
    return jnp.sum(jnp.where(BATCH.clean_mask if term == "clean" else BATCH.loss_mask, WEIGHTS * values[term], 0))


def fused(term, plan, hidden, table):
    teacher = None
    if term in ("kl", "tv"):
        teacher = TeacherStates(PARENT, PARENT_TABLE if plan.vocab_axis == 0 else PARENT_TABLE.T, term)
    sums = loss_sums(hidden, table if plan.vocab_axis == 0 else table.T, plan, BATCH, weights=weights_of(term),
                     teacher=teacher)
    return sums.loss, sums


def check(term, plan):
    (loss, sums), grads = jax.jit(jax.value_and_grad(functools.partial(fused, term, plan), argnums=(0, 1),
                                                     has_aux=True))(HIDDEN, TABLE)
    reference = functools.partial(plain, term, plan.softcap)
    expected, reference = jax.jit(jax.value_and_grad(reference, argnums=(0, 1)))(HIDDEN, TABLE)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for found, wanted in zip(grads, reference, strict=True):
        assert jnp.abs(wanted).max() > 0.1
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
    return sums


@pytest.mark.parametrize("vocab_axis, softcap", [(0, None), (1, None), (0, 3.0)])
@pytest.mark.parametrize("term", FIELDS)
def test_values_and_gradients(term, vocab_axis, softcap):
    sums = check(term, HeadPlan(vocab_axis, chunk_size=16, softcap=softcap))
    assert sums.num_scored == BATCH.loss_mask.sum()
    assert sums.num_clean == (BATCH.clean_mask.sum() if term == "clean" else 0)


@pytest.mark.parametrize("term", FIELDS)
@pytest.mark.parametrize("rows, kernel, gradient_bytes", [
    (PartitionSpec(("a", "b"), None), PartitionSpec(None, "a"), 2**28),
    (PartitionSpec(("a", "b"), None), PartitionSpec(None, "a"), 700),  # the kernel's gradient by blocks
    (PartitionSpec("a", None), PartitionSpec("b", "a"), 2**28)])  # a sharded vocabulary
def test_on_a_mesh(term, rows, kernel, gradient_bytes):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        check(term, HeadPlan(0, mesh, rows, kernel, chunk_size=8, max_gradient_bytes=gradient_bytes))


def test_a_parent_that_agrees_teaches_nothing():
    for term in ("kl", "tv"):
        loss, grads = jax.jit(jax.value_and_grad(lambda hidden: loss_sums(
            hidden, TABLE, HeadPlan(0), BATCH, weights=weights_of(term),  # noqa: B023
            teacher=TeacherStates(HIDDEN, TABLE, term)).loss))(HIDDEN)  # noqa: B023
        np.testing.assert_allclose(loss, 0, atol=1e-4)
        np.testing.assert_allclose(grads, 0, atol=1e-4)


def test_enumerated_divergences():
    """Two tokens: p = 1/4, 3/4 and q = 1/2, 1/2."""
    table = jnp.eye(2)
    batch = NoisyBatch(jnp.zeros((1, 1), int), jnp.zeros((1, 1), int), jnp.ones((1, 1), bool), jnp.ones((1, 1), bool),
                       jnp.ones((1, 1)))
    weights = LossWeights(jnp.zeros((1, 1)), distribution=jnp.ones((1, 1)))
    value = lambda kind: loss_sums(jnp.log(jnp.array([[[0.25, 0.75]]])), table, HeadPlan(0), batch,  # noqa: E731
                                   weights=weights, shift=False,
                                   teacher=TeacherStates(jnp.zeros((1, 1, 2)), table, kind)).divergence
    np.testing.assert_allclose(value("kl"), 0.5 * np.log(2) + 0.5 * np.log(2 / 3), rtol=1e-6)
    np.testing.assert_allclose(value("tv"), 0.25, rtol=1e-6)


def test_states_that_predict_the_same_token_are_compared():
    states = jnp.arange(6.0).reshape(1, 3, 2)
    np.testing.assert_array_equal(align_states(states, 2, shift=True)[0, :, 0], [0, 2, 4, 0, 2, 4])
    np.testing.assert_array_equal(align_states(states, 1, shift=False)[0, 1:, 0], [0, 2])
    assert not jax.grad(lambda x: align_states(x, 2, shift=True).sum())(states).any()


def test_hidden_distance():
    a, b = jax.random.normal(KEYS[0], (2, 3, 8)), jax.random.normal(KEYS[1], (2, 3, 8))
    cosine = np.sum(a * b, axis=-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    np.testing.assert_allclose(hidden_distance(a, b), 1 - cosine, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(hidden_distance(a, 3 * a), 0, atol=1e-6)
    assert jnp.isfinite(jax.grad(lambda x: hidden_distance(x, b).sum())(jnp.zeros_like(a))).all()


def test_a_weighted_distance_is_added():
    distance = jax.random.uniform(KEYS[0], (B, L))
    weights = LossWeights(jnp.zeros((B, L)), distance=WEIGHTS)
    sums = loss_sums(HIDDEN, TABLE, HeadPlan(0), BATCH, weights=weights, distance=distance)
    at_states = jnp.where(BATCH.loss_mask, WEIGHTS, 0)[:, 1:], distance[:, :-1]
    np.testing.assert_allclose(sums.loss, jnp.sum(at_states[0] * at_states[1]), rtol=1e-6)
