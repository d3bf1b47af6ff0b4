"""The TPU kernel on meshes of eight host devices, in interpret mode, against the dense reference on one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_jax.attention import AttentionMask, xla_attention
from dlm_jax.attention.tpu import Tiling
from dlm_jax.attention.tpu_ring import tpu_ring_attention
from dlm_jax.parallel import ATTENTION_PARTITION, MeshConfig
from tests.attention.parity import MESHES, assert_close, inputs, mesh_id, on_mesh, value_and_gradients

LENGTH = 32
EXAMPLES = jnp.array([7, 8, 9, 4_000_000_000], jnp.uint32)
ALL_NARROWINGS = AttentionMask.annealed(0.4, 5, EXAMPLES).with_lengths(jnp.array([LENGTH, 30, 25, 20])).with_segments(
    jnp.repeat(jnp.array([[0, 1, 2]] * 4), jnp.array([7, 12, 13]), axis=1))
RING = functools.partial(tpu_ring_attention, partition=ATTENTION_PARTITION, tiling=Tiling(8, 8, interpret=True))


@pytest.mark.parametrize("mesh", [*MESHES, MeshConfig(fsdp=2, context=4)], ids=mesh_id)
@pytest.mark.parametrize("mask, dropout", [
    pytest.param(AttentionMask.causal(), {}, id="causal"),
    pytest.param(ALL_NARROWINGS, dict(dropout_rate=0.2, dropout_seeds=EXAMPLES + 1), id="narrowed, dropout"),
])
def test_mesh_matches_one_device(mesh, mask, dropout):
    tensors = inputs(4, LENGTH)
    with jax.default_matmul_precision("highest"):
        expected = jax.jit(functools.partial(value_and_gradients, xla_attention, **dropout))(tensors, mask)
        found = on_mesh(mesh, functools.partial(RING, **dropout), tensors, mask)
    assert_close(found, expected, 1e-5)


def test_without_a_mesh_nothing_is_split():
    tensors, mask = inputs(4, LENGTH)[:3], AttentionMask.bidirectional()
    np.testing.assert_allclose(RING(*tensors, mask), xla_attention(*tensors, mask), atol=2e-5)
