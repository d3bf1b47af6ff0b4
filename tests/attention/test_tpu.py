"""The kernels run in interpret mode; Mosaic's lowering, and libtpu if installed, show that a TPU takes them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding, PartitionSpec

from dlm_jax.attention import AttentionMask, xla_attention
from dlm_jax.attention.tpu import Offsets, Tiling, tpu_attention
from dlm_jax.errors import ConfigError
from tests.attention.parity import CAUSAL, EXAMPLES, LENGTH, MASKS, SEGMENTS, assert_close, inputs, run

INTERPRETED = functools.partial(tpu_attention, tiling=Tiling(16, 16, interpret=True))
DROPOUT = dict(dropout_rate=0.3, dropout_seeds=jnp.array([3, 9], jnp.uint32))


def assert_parity(tensors, mask, tolerance=1e-5, **options):
    found, expected = (run(attention, tensors, mask, **options) for attention in (INTERPRETED, xla_attention))
    assert [x.dtype for x in found] == [x.dtype for x in expected]
    assert_close(found, expected, tolerance)


KERNEL_MASKS = {name: MASKS[name] for name in (
    "causal", "causal, branches", "bidirectional", "block causal", "annealed, narrowed")} | {
    "blocks, two views": AttentionMask.block_diffusion(6, 15, views=2),
    "causal blocks": AttentionMask.block_diffusion(6, 23, causal_blocks=True),
    "blocks, bidirectional, narrowed": AttentionMask.block_diffusion(4, 23, bidirectional_clean=True).with_window(
        9).with_segments(SEGMENTS[:, :23]),
}


@pytest.mark.parametrize("name", KERNEL_MASKS)
def test_matches_xla(name):
    length = (KERNEL_MASKS[name].spec.views + 1) * KERNEL_MASKS[name].spec.text_length or LENGTH
    assert_parity(inputs(2, length), KERNEL_MASKS[name])


@pytest.mark.parametrize("ratio", [0.0, 0.4, 1.0])
def test_matches_xla_at_any_traced_ratio(ratio):
    assert_parity(inputs(2, LENGTH), AttentionMask.annealed(ratio, 5, EXAMPLES))


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_matches_xla_with_grouped_queries_and_dropout(kv_heads):
    assert_parity(inputs(2, LENGTH, kv_heads=kv_heads), CAUSAL, **DROPOUT)


def test_matches_xla_with_a_soft_cap():
    assert_parity(inputs(2, LENGTH), MASKS["annealed, narrowed"], softcap=0.7, **DROPOUT)


def test_matches_xla_in_bfloat16():
    assert_parity(inputs(2, 32, dtype=jnp.bfloat16), AttentionMask.annealed(0.3, 5), tolerance=0.02)


def test_shards_of_keys_merge_and_shards_of_queries_know_their_position():
    query, key, value, weights = inputs(2, 48)
    mask = AttentionMask.annealed(0.3, 5, EXAMPLES).with_lengths(jnp.array([48, 31])).with_segments(
        jnp.pad(SEGMENTS, ((0, 0), (0, 3)), mode="edge"))
    first = 20

    def merged(query, key, value):
        def attend(shard):
            offset, key, value = shard
            return INTERPRETED(query[:, first:], key, value, mask, offsets=Offsets(first, offset),
                               return_logsumexp=True, **DROPOUT)
        halves = (x.reshape(2, 2, 24, *x.shape[2:]).swapaxes(0, 1) for x in (key, value))
        out, logsumexp = jax.lax.map(attend, (jnp.array([0, 24]), *halves))
        return jnp.einsum("sbqhd,sbhq->bqhd", out, jax.nn.softmax(logsumexp, axis=0))

    def full(query, key, value):
        return xla_attention(query, key, value, mask, **DROPOUT)[:, first:]

    def values(attention):
        return jax.jit(jax.value_and_grad(lambda *x: jnp.sum(attention(*x) * weights[:, first:]), (0, 1, 2)))(
            query, key, value)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-5), values(merged), values(full))


def test_shard_of_heads_drops_the_same_probabilities():
    query, key, value, _ = inputs(2, LENGTH)
    attend = jax.jit(functools.partial(INTERPRETED, mask=CAUSAL, **DROPOUT))
    full = attend(query, key, value)
    shard = attend(query[:, :, 2:], key[:, :, 1:], value[:, :, 1:], offsets=Offsets(kv_head=1))
    np.testing.assert_allclose(shard, full[:, :, 2:], atol=1e-6)


def test_query_that_sees_nothing_gives_zero():
    query, key, value, _ = inputs(2, LENGTH)
    mask = CAUSAL.with_lengths(jnp.array([0, LENGTH]))

    def loss(*x):  # the first ten queries come before every key: their tile is visited for the others
        out, logsumexp = INTERPRETED(*x, mask, offsets=Offsets(key=10), return_logsumexp=True)
        return jnp.sum(out**2), (out, logsumexp)
    gradients, (out, logsumexp) = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(query, key, value)
    for x in (out, gradients[0]):
        assert not x[0].any() and not x[1, :10].any() and x[1, 11:].any(axis=(1, 2)).all()
    assert (logsumexp[0] == -1e30).all() and (logsumexp[1, :, :10] == -1e30).all() and (logsumexp[1, :, 10:] > -9).all()
    assert all(np.isfinite(x).all() and not x[0].any() for x in gradients)


def test_matrices_and_odd_tiles_are_refused():
    tensors = inputs(2, LENGTH)[:3]
    with pytest.raises(ConfigError, match="matrix"):
        INTERPRETED(*tensors, AttentionMask.matrix(jnp.ones((LENGTH, LENGTH), bool)))
    with pytest.raises(ConfigError, match="block_q=16"):
        tpu_attention(*tensors, CAUSAL, tiling=Tiling(block_q=16))


def tpu_gradients(head_dim: int, length: int):
    """Returns a jitted gradient that uses every feature of the kernels, and the shapes of its arguments."""
    def loss(query, key, value, ratio, segments, lengths):
        mask = AttentionMask.annealed(ratio, 5, EXAMPLES).with_segments(segments).with_lengths(lengths).with_window(900)
        return jnp.sum(tpu_attention(query, key, value, mask, **DROPOUT).astype(jnp.float32))

    shapes = [((2, length, h, head_dim), jnp.bfloat16) for h in (4, 2, 2)]
    shapes += [((), jnp.float32), ((2, length), jnp.int32), ((2,), jnp.int32)]
    return jax.jit(jax.grad(loss, (0, 1, 2))), shapes


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
def test_lowers_for_a_tpu(head_dim):
    device = AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    gradients, shapes = tpu_gradients(head_dim, length=1100)
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=device)):
        lowered = gradients.trace(*(jax.ShapeDtypeStruct(*x) for x in shapes)).lower(lowering_platforms=("tpu",))
    assert lowered.as_text().count("tpu_custom_call") == 3


@pytest.fixture
def tpu_mesh(monkeypatch):
    """One chip to compile for. Pallas asks the mesh which TPU it lowers for."""
    pytest.importorskip("libtpu")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    from jax.experimental import topologies
    device = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]
    return jax.sharding.Mesh([device], ("x",), axis_types=(AxisType.Auto,))


def compiled_for(mesh, function, shapes):
    with jax.set_mesh(mesh):
        replicated = NamedSharding(mesh, PartitionSpec())
        return function.lower(*(jax.ShapeDtypeStruct(*x, sharding=replicated) for x in shapes)).compile()


def test_compiles_for_a_tpu_without_a_square(tpu_mesh):
    length = 8192
    compiled = compiled_for(tpu_mesh, *tpu_gradients(head_dim=64, length=length))
    assert compiled.memory_analysis().peak_memory_in_bytes < 4 * length**2  # the float32 square of one head


@pytest.mark.parametrize("name", sorted({*MASKS, *KERNEL_MASKS} - {"matrix"}))
def test_every_mask_compiles_for_a_tpu(tpu_mesh, name):
    def loss(query, key, value):
        return jnp.sum(tpu_attention(query, key, value, (MASKS | KERNEL_MASKS)[name]).astype(jnp.float32))

    shapes = [((2, LENGTH, 2, 64), jnp.bfloat16)] * 3
    assert compiled_for(tpu_mesh, jax.jit(jax.grad(loss, (0, 1, 2))), shapes)
