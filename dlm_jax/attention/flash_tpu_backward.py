"""The gradients of TPU flash attention: one kernel for the queries, one for the keys and values."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dlm_jax.attention.flash_tpu_tile import Blocks, Gradient, Plan, Scalars, Tensors, Tile, launch, over_keys, product


def query_gradient(plan: Plan, scalars: Scalars, tensors: Tensors, gradient: Gradient) -> jax.Array:
    """[batch, heads, head_dim, Q]."""
    batch, heads, head_dim, q_len = tensors.query.shape
    k_tiles = tensors.key.shape[-1] // plan.block_k

    blocks = Blocks(plan, head_dim, functools.partial(over_keys, plan))
    return launch(
        plan, "flash_attention_dq", functools.partial(_query_kernel, plan),
        (batch, heads, q_len // plan.block_q, k_tiles), 1, (blocks.tensors, blocks.gradient), blocks.query,
        jax.ShapeDtypeStruct(tensors.query.shape, tensors.query.dtype),
        (pltpu.VMEM((head_dim, plan.block_q), jnp.float32),), scalars, tensors, gradient)


def _query_kernel(plan: Plan, scalars: Scalars, tensors: Tensors, gradient: Gradient, dq, dq_sum) -> None:
    """Steps over the tiles of keys; `dq_sum` [head_dim, block_q]."""
    b, h, i, j = (pl.program_id(axis) for axis in range(4))
    tile = Tile(plan, scalars, b, h, i, j)

    @pl.when(j == 0)
    def _():
        dq_sum[...] = jnp.zeros_like(dq_sum)

    @tile.visit
    def _(masked: bool):
        d_scores, _ = tile.gradients(tensors, gradient, masked)
        dq_sum[...] += product(tensors.key[...], d_scores, (1, 0))

    @pl.when(j == pl.num_programs(3) - 1)
    def _():
        dq[...] = dq_sum[...].astype(dq.dtype)


def key_value_gradients(plan: Plan, scalars: Scalars, tensors: Tensors,
                        gradient: Gradient) -> tuple[jax.Array, jax.Array]:
    """Two [batch, kv_heads, head_dim, K], summed over the queries and over the heads of a group."""
    batch, kv_heads, head_dim, k_len = tensors.key.shape
    q_tiles = tensors.query.shape[-1] // plan.block_q

    def place(b, kv_head, j, group, i, scalars):
        head = kv_head * plan.groups + group
        some, _ = Tile(plan, scalars, b, head, i, j).extent()
        return b, head, jnp.where(some, i, 0), j

    blocks = Blocks(plan, head_dim, place)
    total = pltpu.VMEM((head_dim, plan.block_k), jnp.float32)
    return launch(
        plan, "flash_attention_dkv", functools.partial(_key_value_kernel, plan),
        (batch, kv_heads, k_len // plan.block_k, plan.groups, q_tiles), 2, (blocks.tensors, blocks.gradient),
        (blocks.key, blocks.key), tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (tensors.key, tensors.value)),
        (total, total), scalars, tensors, gradient)


def _key_value_kernel(plan: Plan, scalars: Scalars, tensors: Tensors, gradient: Gradient, dk, dv, dk_sum,
                      dv_sum) -> None:
    """Steps over the heads of a group and over the tiles of queries; sums [head_dim, block_k]."""
    b, kv_head, j, group, i = (pl.program_id(axis) for axis in range(5))
    tile = Tile(plan, scalars, b, kv_head * plan.groups + group, i, j)

    @pl.when((group == 0) & (i == 0))
    def _():
        dk_sum[...] = jnp.zeros_like(dk_sum)
        dv_sum[...] = jnp.zeros_like(dv_sum)

    @tile.visit
    def _(masked: bool):
        d_scores, probabilities = tile.gradients(tensors, gradient, masked)
        dk_sum[...] += product(tensors.query[...], d_scores, (1, 1))
        dv_sum[...] += product(gradient.out[...], probabilities, (1, 1))

    @pl.when((group == plan.groups - 1) & (i == pl.num_programs(4) - 1))
    def _():
        dk[...] = dk_sum[...].astype(dk.dtype)
        dv[...] = dv_sum[...].astype(dv.dtype)
