"""The TPU kernel on meshes of eight host devices, in interpret mode, against the dense reference on one."""

import functools

import pytest

from dlm_jax.attention import xla_attention
from dlm_jax.attention.tpu import Tiling
from dlm_jax.attention.tpu_ring import tpu_ring_attention
from dlm_jax.parallel import ATTENTION_PARTITION, MeshConfig
from tests.attention.parity import (
    MESH_EXAMPLES,
    MESH_LENGTH,
    MESH_MASKS,
    MESHES,
    assert_close,
    inputs,
    mesh_id,
    on_mesh,
    run,
)

RING = functools.partial(tpu_ring_attention, partition=ATTENTION_PARTITION, tiling=Tiling(8, 8, interpret=True))


@pytest.mark.parametrize("mesh, name, rate", [
    (MESHES[1], "causal", 0.0),
    *((mesh, "annealed, narrowed", 0.2) for mesh in (*MESHES, MeshConfig(fsdp=2, context=4)))], ids=mesh_id)
def test_mesh_matches_one_device(mesh, name, rate):
    tensors, mask, options = inputs(4, MESH_LENGTH), MESH_MASKS[name], {"dropout_rate": rate, "softcap": rate or None}
    if rate:
        options["dropout_seeds"] = MESH_EXAMPLES + 1
    found = on_mesh(mesh, functools.partial(RING, **options), tensors, mask)
    assert_close(found, run(xla_attention, tensors, mask, **options), 1e-5)


def test_without_a_mesh_nothing_is_split():
    tensors = inputs(4, MESH_LENGTH)
    found = run(RING, tensors, MESH_MASKS["causal"])
    assert_close(found, run(xla_attention, tensors, MESH_MASKS["causal"]), 1e-5)
