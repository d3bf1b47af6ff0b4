"""The TPU kernel under a mesh: each device attends for its own examples, heads and queries, and keys travel a ring."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from dlm_jax.attention.mask import AttentionMask
from dlm_jax.attention.partition import Partition, is_split, over_shards
from dlm_jax.attention.tpu import tpu_attention, tpu_attention_gradients


def tpu_ring_attention(query: jax.Array, key: jax.Array, value: jax.Array, mask: AttentionMask, *,
                          partition: Partition | None = None, dropout_rate: float = 0.0,
                          dropout_seeds: jax.Array | None = None, **tuning) -> jax.Array:
    """`tpu_attention` on arrays that are split over the mesh in use (`jax.set_mesh`).

    Args:
      query, key, value: global arrays [batch, length, heads or kv_heads, head_dim].
      partition: how they are split; None: they are not.
      tuning: block sizes and `interpret`, as for `tpu_attention`.
    """
    if not is_split(partition):
        return tpu_attention(query, key, value, mask, dropout_rate=dropout_rate, dropout_seeds=dropout_seeds,
                                   **tuning)
    rows = PartitionSpec(partition.batch)
    # Whatever a mask or dropout knows of each example is split as the batch is; a row of segments stays whole.
    by_example = functools.partial(jax.tree.map, lambda x: rows if x.ndim else PartitionSpec())

    def local(query: jax.Array, key: jax.Array, value: jax.Array, mask: AttentionMask,
              dropout_seeds: jax.Array | None) -> jax.Array:
        head = jax.lax.axis_index(partition.heads) * key.shape[2]
        ring = Ring(partition.length, jax.lax.axis_size(partition.length), dropout_rate, tuple(tuning.items()))
        return _ring_attention(ring, query, key, value, mask, dropout_seeds, head)

    specs = by_example(mask), by_example(dropout_seeds)
    return over_shards(partition, local, specs, query, key, value, mask, dropout_seeds)


@dataclasses.dataclass(frozen=True)
class Ring:
    """The mesh axis of the length, its size, and what the kernel is told beside."""

    axis: str
    size: int
    dropout_rate: float
    tuning: tuple[tuple[str, object], ...]

    def options(self, dropout_seeds: jax.Array | None, kv_head_offset: jax.Array, query: jax.Array, key: jax.Array,
                hop: jax.Array | int) -> dict:
        """The kernel's keywords when the keys at hand have come `hop` devices along the ring."""
        here = jax.lax.axis_index(self.axis)
        return {"dropout_rate": self.dropout_rate, "dropout_seeds": dropout_seeds, "kv_head_offset": kv_head_offset,
                "query_offset": here * query.shape[1], "key_offset": (here + hop) % self.size * key.shape[1],
                **dict(self.tuning)}

    def travel(self, *arrays: jax.Array) -> tuple[jax.Array, ...]:
        """Each array from the next device on."""
        return jax.lax.ppermute(arrays, self.axis, [((i + 1) % self.size, i) for i in range(self.size)])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring_attention(ring: Ring, query: jax.Array, key: jax.Array, value: jax.Array, mask: AttentionMask,
                    dropout_seeds: jax.Array | None, kv_head_offset: jax.Array) -> jax.Array:
    """Attention of this device's queries to the keys of all (Liu et al., arXiv 2310.01889), in `query`'s type.

    Only what lies here is kept for the backward pass, which sends keys and values around once more.
    """
    return _forward(ring, query, key, value, mask, dropout_seeds, kv_head_offset)[0]


def _forward(ring: Ring, query: jax.Array, key: jax.Array, value: jax.Array, mask: AttentionMask,
             dropout_seeds: jax.Array | None, kv_head_offset: jax.Array):
    out = logsumexp = None
    key_here, value_here = key, value
    for hop in range(ring.size):
        options = ring.options(dropout_seeds, kv_head_offset, query, key, hop)
        part, part_logsumexp = tpu_attention(query, key_here, value_here, mask, return_residuals=True, **options)
        out, logsumexp = (part, part_logsumexp) if hop == 0 else _merge(out, logsumexp, part, part_logsumexp)
        if hop + 1 < ring.size:
            key_here, value_here = ring.travel(key_here, value_here)
    out = out.astype(query.dtype)
    return out, (query, key, value, mask, dropout_seeds, kv_head_offset, out, logsumexp)


def _merge(out: jax.Array, logsumexp: jax.Array, part: jax.Array,
           part_logsumexp: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Attention over two sets of keys from that over each; float32 [batch, Q, heads, head_dim], [batch, heads, Q]."""
    total = jnp.logaddexp(logsumexp, part_logsumexp)
    share = jnp.exp(part_logsumexp - total).transpose(0, 2, 1)[..., None]
    return out.astype(jnp.float32) * (1 - share) + part.astype(jnp.float32) * share, total


def _backward(ring: Ring, saved, d_out: jax.Array):
    query, key, value, mask, dropout_seeds, kv_head_offset, out, logsumexp = saved
    def visit(carry: tuple, hop: jax.Array) -> tuple[tuple, None]:
        key, value, sums = carry
        options = ring.options(dropout_seeds, kv_head_offset, query, key, hop)
        parts = tpu_attention_gradients(query, key, value, mask, out, logsumexp, d_out, **options)
        sums = tuple(total + part.astype(jnp.float32) for total, part in zip(sums, parts, strict=True))
        if ring.size > 1:  # the gradients travel with their keys, and after the last hop are home
            key, value, by_key, by_value = ring.travel(key, value, *sums[1:])
            sums = sums[0], by_key, by_value
        return (key, value, sums), None

    zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (query, key, value))
    # A loop and not its hops written out, so that only one hop's arrays exist at a time.
    (_, _, (d_query, d_key, d_value)), _ = jax.lax.scan(visit, (key, value, zeros), jnp.arange(ring.size))
    return (d_query.astype(query.dtype), d_key.astype(key.dtype), d_value.astype(value.dtype), None, None, None)


_ring_attention.defvjp(_forward, _backward)
