"""The TPU kernel under meshes of eight host devices, in interpret mode, against the dense reference on one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dlm_jax.attention import AttentionMask, Partition, xla_attention
from dlm_jax.attention.tpu_ring import tpu_ring_attention
from dlm_jax.parallel import ATTENTION_PARTITION, MeshConfig, make_mesh

LENGTH, HEADS, KV_HEADS = 32, 4, 2
EXAMPLES = jnp.array([7, 8, 9, 4_000_000_000], jnp.uint32)
SEGMENTS = jnp.repeat(jnp.array([[0, 1, 2]] * 4), jnp.array([7, 12, 13]), axis=1)
SMALL = {"block_q": 8, "block_k": 8, "interpret": True}
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # mostly compiles


def inputs():
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.normal(size=(4, LENGTH, heads, 8)), jnp.float32)
                 for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS))


def value_and_gradients(attention, tensors, mask, seeds):
    def loss(query, key, value):
        out = attention(query, key, value, mask, dropout_seeds=seeds, dropout_rate=0.0 if seeds is None else 0.2)
        return jnp.sum(out * tensors[3]), out
    gradients, out = jax.grad(loss, (0, 1, 2), has_aux=True)(*tensors[:3])
    return out, *gradients


@pytest.mark.parametrize("mesh", [
    MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(fsdp=2, context=4), MeshConfig(data=2, tensor=2, context=2)],
    ids=lambda mesh: "x".join(map(str, mesh.sizes())))
@pytest.mark.parametrize(("mask", "seeds"), [
    pytest.param(AttentionMask.causal(), None, id="causal"),
    pytest.param(AttentionMask.annealed(0.4, 5, EXAMPLES).with_segments(SEGMENTS).with_lengths(
        jnp.array([LENGTH, 30, 25, 20])), EXAMPLES + jnp.uint32(1), id="everything and dropout"),
])
def test_a_mesh_computes_what_one_device_does(mesh, mask, seeds):
    tensors = inputs()
    with jax.default_matmul_precision("highest"):
        expected = jit(functools.partial(value_and_gradients, xla_attention))(tensors, mask, seeds)
        mesh = make_mesh(mesh)
        split = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), "context", "tensor"))
        attention = functools.partial(tpu_ring_attention, partition=ATTENTION_PARTITION, **SMALL)
        with jax.set_mesh(mesh):
            found = jit(functools.partial(value_and_gradients, attention))(
                tuple(jax.device_put(tensor, split) for tensor in tensors), mask, seeds)
    for name, x, y in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5, rtol=2e-5, err_msg=name)


def test_without_a_mesh_nothing_is_split():
    query, key, value, _ = inputs()
    mask = AttentionMask.bidirectional()
    out = tpu_ring_attention(query, key, value, mask, partition=Partition(("data",), "tensor", "context"), **SMALL)
    np.testing.assert_allclose(out, xla_attention(query, key, value, mask), atol=2e-5)
