"""Inputs, gradients and comparisons for tests of an attention backend against the dense reference."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from dlm_jax.attention import AttentionMask, xla_attention
from dlm_jax.parallel import MeshConfig, make_mesh

ON_GPU = jax.default_backend() == "gpu"

LENGTH = 45  # odd, and three tiles of 16 of which the last is not full
EXAMPLES = jnp.array([7, 4_000_000_000], jnp.uint32)
LENGTHS, SEGMENTS = jnp.array([41, 19]), jnp.repeat(jnp.array([[0, 1, 2]] * 2), jnp.array([7, 18, 20]), axis=1)
CAUSAL, BIDIRECTIONAL = AttentionMask.causal(), AttentionMask.bidirectional()
MASKS = {
    "causal": CAUSAL,
    "causal, window": CAUSAL.with_window(5),
    "causal, lengths": CAUSAL.with_lengths(LENGTHS),
    "causal, window, lengths": CAUSAL.with_window(5).with_lengths(LENGTHS),
    "causal, segments": CAUSAL.with_segments(SEGMENTS),
    "causal, branches": CAUSAL.with_branches(SEGMENTS // 2, SEGMENTS % 2),
    "bidirectional": BIDIRECTIONAL,
    "bidirectional, window": BIDIRECTIONAL.with_window(5),
    "bidirectional, lengths": BIDIRECTIONAL.with_lengths(LENGTHS),
    "bidirectional, segments": BIDIRECTIONAL.with_segments(SEGMENTS),
    "annealed": AttentionMask.annealed(0.4, 5, EXAMPLES),
    "annealed, shared": AttentionMask.annealed(0.4, 5),
    "annealed, narrowed": AttentionMask.annealed(0.4, 5, EXAMPLES).with_segments(SEGMENTS).with_window(
        30).with_lengths(LENGTHS),
    "block causal": AttentionMask.block_causal(6),
    "matrix": AttentionMask.matrix(np.tri(LENGTH, k=3)),
}

TEXT = 10  # of block diffusion
TEXT_SEGMENTS = np.array([[0] * 3 + [1] * 7, [0] * 6 + [1] * 4])
BLOCK_MASKS = {
    "size 1": AttentionMask.block_diffusion(1, TEXT),
    "bidirectional clean": AttentionMask.block_diffusion(3, TEXT, bidirectional_clean=True),
    "two views, segments": AttentionMask.block_diffusion(5, TEXT, 2).with_segments(TEXT_SEGMENTS),
    "narrowed": AttentionMask.block_diffusion(4, TEXT, bidirectional_clean=True).with_window(3).with_segments(
        TEXT_SEGMENTS),
    "causal blocks": AttentionMask.block_diffusion(4, TEXT, 2, causal_blocks=True).with_segments(TEXT_SEGMENTS),
    "one block": AttentionMask.block_diffusion(TEXT, TEXT),
    "block longer than the text": AttentionMask.block_diffusion(64, TEXT, 2).with_window(6),
}

MESHES = [MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(data=2, tensor=2, context=2)]
MESH_LENGTH, MESH_EXAMPLES = 32, jnp.array([7, 8, 9, 4_000_000_000], jnp.uint32)
MESH_LENGTHS = jnp.array([32, 30, 25, 20])
MESH_MASKS = {
    "causal": CAUSAL,
    "causal, window": CAUSAL.with_window(5),
    "bidirectional, lengths": BIDIRECTIONAL.with_lengths(MESH_LENGTHS),
    "annealed, shared": AttentionMask.annealed(0.4, 5),
    "annealed, narrowed": AttentionMask.annealed(0.4, 5, MESH_EXAMPLES).with_lengths(MESH_LENGTHS).with_segments(
        jnp.repeat(jnp.array([[0, 1, 2]] * 4), jnp.array([7, 12, 13]), axis=1)),
}


def mesh_id(value):
    return "x".join(map(str, value.sizes())) if isinstance(value, MeshConfig) else None


def inputs(batch, length, heads=4, kv_heads=2, head_dim=8, dtype=jnp.float32):
    """Returns query, key, value, and the weights of the output in a loss."""
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.normal(size=(batch, length, n, head_dim)), dtype)
                 for n in (heads, kv_heads, kv_heads, heads))


def value_and_gradients(attention, tensors, mask, **options):
    """Returns output and gradients; queries that see nothing are left out, because backends differ there."""
    def loss(query, key, value):
        positions = jnp.arange(query.shape[1])
        sees = mask.allowed(positions, positions).any(-1)[:, :, None, None]
        out = jnp.where(sees, attention(query, key, value, mask, **options), 0)
        return jnp.sum(out.astype(jnp.float32) * tensors[3].astype(jnp.float32)), out
    gradients, out = jax.grad(loss, (0, 1, 2), has_aux=True)(*tensors[:3])
    return out, *gradients


run = jax.jit(value_and_gradients, static_argnums=0, static_argnames=("dropout_rate", "softcap"))


@functools.cache
def reference(name, length=LENGTH, kv_heads=2, dtype="float32"):
    """Returns the dense reference's `value_and_gradients` in float32, for inputs of `dtype` under one of MASKS."""
    tensors = inputs(2, length, kv_heads=kv_heads, dtype=dtype)
    return run(xla_attention, tuple(x.astype(jnp.float32) for x in tensors), MASKS[name])


def on_mesh(config, attention, tensors, mask, **options):
    """Returns `value_and_gradients` computed on a mesh over which the tensors are split."""
    mesh = make_mesh(config)
    split = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), "context", "tensor"))
    with jax.set_mesh(mesh):
        tensors = tuple(jax.device_put(tensor, split) for tensor in tensors)
        return jax.jit(functools.partial(value_and_gradients, attention))(tensors, mask, **options)


def assert_close(found, expected, tolerance):
    """Compares outputs and gradients relative to the largest value of each."""
    for name, x, y in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
        x, y = (np.asarray(z, np.float32) for z in (x, y))
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * np.abs(y).max(), err_msg=name)


def lowered_cudnn_calls(function, *args):
    """Returns cuDNN's calls in a program lowered for CUDA: the target, and its number of results without workspace."""
    text = jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    return [(name, int(results) - 1)
            for results, name in re.findall(r":(\d+) = stablehlo.custom_call @__cudnn\$(\w+)", text)]
