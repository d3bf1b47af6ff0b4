import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_jax.attention import AttentionMask, attend, xla_attention
from dlm_jax.attention.xla import xla_block_attention
from tests.attention.parity import BLOCK_MASKS, CAUSAL, LENGTH, MASKS, assert_close, inputs, reference, run

run_attend = jax.jit(attend, static_argnames="dropout_rate")


def naive(query, key, value, allowed):
    """One head and one query at a time, in float64."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    out = np.zeros_like(query)
    for b, i, h in np.ndindex(query.shape[:3]):
        kv = h // (query.shape[2] // key.shape[2])
        sees = np.flatnonzero(allowed[b % len(allowed), i])
        if not len(sees):
            continue
        scores = key[b, sees, kv] @ query[b, i, h] / np.sqrt(query.shape[3])
        p = np.exp(scores - scores.max())
        out[b, i, h] = p / p.sum() @ value[b, sees, kv]
    return out


@pytest.mark.parametrize("name, kv_heads", [*((name, 2) for name in MASKS), ("causal", 1), ("causal", 4)])
def test_matches_the_definition(name, kv_heads):
    tensors = inputs(2, LENGTH, kv_heads=kv_heads)[:3]
    allowed = np.asarray(MASKS[name].allowed(jnp.arange(LENGTH), jnp.arange(LENGTH)))
    np.testing.assert_allclose(reference(name, kv_heads=kv_heads)[0], naive(*tensors, allowed), atol=2e-6)


@pytest.mark.parametrize("name", ["causal", "bidirectional", "annealed, narrowed"])
def test_soft_cap_matches_automatic_differentiation(name):
    tensors, mask = inputs(2, LENGTH), MASKS[name]

    def plain(query, key, value, mask):
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, jnp.repeat(key, 2, axis=2)) * query.shape[-1] ** -0.5
        allowed = mask.allowed(jnp.arange(LENGTH), jnp.arange(LENGTH))[:, None]
        weights = jax.nn.softmax(jnp.where(allowed, 0.8 * jnp.tanh(scores / 0.8), -1e30), axis=-1)
        return jnp.einsum("bhqk,bkhd->bqhd", weights, jnp.repeat(value, 2, axis=2))

    assert_close(run(xla_attention, tensors, mask, softcap=0.8), run(plain, tensors, mask), 5e-6)


def test_bfloat16_keeps_its_dtype_and_a_float32_softmax():
    tensors = inputs(2, LENGTH, dtype=jnp.bfloat16)[:3]
    out = run_attend(*tensors, CAUSAL)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(np.float32), naive(*tensors, np.tri(LENGTH)[None]), atol=0.03)


def test_query_that_sees_nothing_stays_finite():
    query, key, value, _ = inputs(2, LENGTH)
    mask = AttentionMask.matrix(jnp.zeros((LENGTH, LENGTH), bool))
    assert np.isfinite(jax.jit(jax.grad(lambda q: jnp.sum(attend(q, key, value, mask) ** 2)))(query)).all()


def test_dropout_depends_on_the_example_not_its_row():
    query, key, value, _ = inputs(2, LENGTH)
    run = lambda rows, seeds: run_attend(query[rows], key[rows], value[rows], CAUSAL,  # noqa: E731
                                         dropout_rate=0.5, dropout_seeds=jnp.asarray(seeds, jnp.uint32))
    both, second = run(np.array([0, 1]), [3, 9]), run(np.array([1]), [9])
    np.testing.assert_allclose(both[1], second[0], atol=1e-6)
    assert (np.asarray(run(np.array([1]), [4])) != np.asarray(second)).any()


@pytest.mark.parametrize("name, rate, softcap", [*((name, 0.3, None) for name in BLOCK_MASKS),
                                                 ("two views, segments", 0.0, 0.7)])
def test_block_path_matches_the_full_square(name, rate, softcap):
    mask = BLOCK_MASKS[name]
    options = dict(dropout_rate=rate, dropout_seeds=jnp.array([3, 9], jnp.uint32), softcap=softcap)
    tensors = inputs(2, mask.spec.text_length * (mask.spec.views + 1))
    found, expected = (run(attention, tensors, mask, **options) for attention in (xla_block_attention, xla_attention))
    assert_close(found, expected, 5e-6)
