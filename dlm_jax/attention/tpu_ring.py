"""The TPU kernel under a mesh: each device computes its own examples, heads and queries; keys travel around a ring."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from dlm_jax.attention.mask import AttentionMask
from dlm_jax.attention.partition import Partition, is_split, on_shards
from dlm_jax.attention.tpu import Offsets, Options, Tiling, tpu_attention, tpu_attention_gradients


def tpu_ring_attention(query: jax.Array, key: jax.Array, value: jax.Array, mask: AttentionMask, *,
                       partition: Partition | None = None, dropout_rate: float = 0.0,
                       dropout_seeds: jax.Array | None = None, softcap: float | None = None,
                       tiling: Tiling = Tiling()) -> jax.Array:
    """Computes `tpu_attention` of arrays that are split over the mesh in use (`jax.set_mesh`).

    Args:
      query, key, value: global arrays [batch, length, heads or kv_heads, head_dim].
      partition: how they are split; None: they are not.
    """
    if not is_split(partition):
        return tpu_attention(query, key, value, mask, dropout_rate=dropout_rate, dropout_seeds=dropout_seeds,
                             softcap=softcap, tiling=tiling)
    batch = PartitionSpec(partition.batch)
    # Arrays of a mask or of dropout are split per example; segment ids are not split along the length.
    by_example = functools.partial(jax.tree.map, lambda x: batch if x.ndim else PartitionSpec())

    def local(query: jax.Array, key: jax.Array, value: jax.Array, mask: AttentionMask,
              dropout_seeds: jax.Array | None) -> jax.Array:
        head = jax.lax.axis_index(partition.heads) * key.shape[2]
        ring = _Ring(partition.length, jax.lax.axis_size(partition.length), dropout_rate, softcap, tiling)
        return _ring_attention(ring, query, key, value, mask, dropout_seeds, head)

    specs = by_example(mask), by_example(dropout_seeds)
    return on_shards(partition, local, specs, query, key, value, mask, dropout_seeds)


@dataclasses.dataclass(frozen=True)
class _Ring:
    """The mesh axis that splits the length, its size, and the kernel's static options."""

    axis: str
    size: int
    dropout_rate: float
    softcap: float | None
    tiling: Tiling

    def options(self, dropout_seeds: jax.Array | None, kv_head_offset: jax.Array, query: jax.Array, key: jax.Array,
                hop: jax.Array | int) -> Options:
        """Returns the kernel's options for keys that have traveled `hop` devices."""
        device = jax.lax.axis_index(self.axis)
        offsets = Offsets(device * query.shape[1], (device + hop) % self.size * key.shape[1], kv_head_offset)
        return Options(self.dropout_rate, dropout_seeds, self.softcap, offsets, self.tiling)

    def rotate(self, *arrays: jax.Array) -> tuple[jax.Array, ...]:
        """Fetches each array from the next device."""
        return jax.lax.ppermute(arrays, self.axis, [((i + 1) % self.size, i) for i in range(self.size)])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring_attention(ring: _Ring, query: jax.Array, key: jax.Array, value: jax.Array, mask: AttentionMask,
                    dropout_seeds: jax.Array | None, kv_head_offset: jax.Array) -> jax.Array:
    """Computes attention of this device's queries to all keys (Liu et al., arXiv 2310.01889), in `query`'s dtype.

    Only this device's shards are saved for the backward pass, which rotates keys and values once more.
    """
    return _forward(ring, query, key, value, mask, dropout_seeds, kv_head_offset)[0]


def _forward(ring: _Ring, query: jax.Array, key: jax.Array, value: jax.Array, mask: AttentionMask,
             dropout_seeds: jax.Array | None, kv_head_offset: jax.Array):
    out = logsumexp = None
    shard_key, shard_value = key, value
    for hop in range(ring.size):
        options = ring.options(dropout_seeds, kv_head_offset, query, key, hop)
        shard = tpu_attention(query, shard_key, shard_value, mask, return_logsumexp=True,
                              **options._asdict())
        out, logsumexp = shard if hop == 0 else _merge(out, logsumexp, *shard)
        if hop + 1 < ring.size:
            shard_key, shard_value = ring.rotate(shard_key, shard_value)
    out = out.astype(query.dtype)
    return out, (query, key, value, mask, dropout_seeds, kv_head_offset, out, logsumexp)


def _merge(out: jax.Array, logsumexp: jax.Array, shard_out: jax.Array,
           shard_logsumexp: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Merges attention over two sets of keys; float32 [batch, Q, heads, head_dim] and [batch, heads, Q]."""
    total = jnp.logaddexp(logsumexp, shard_logsumexp)
    share = jnp.exp(shard_logsumexp - total).transpose(0, 2, 1)[..., None]
    return out.astype(jnp.float32) * (1 - share) + shard_out.astype(jnp.float32) * share, total


def _backward(ring: _Ring, saved, d_out: jax.Array):
    query, key, value, mask, dropout_seeds, kv_head_offset, out, logsumexp = saved

    def visit(carry: tuple, hop: jax.Array) -> tuple[tuple, None]:
        key, value, sums = carry
        options = ring.options(dropout_seeds, kv_head_offset, query, key, hop)
        gradients = tpu_attention_gradients(query, key, value, mask, out, logsumexp, d_out, options)
        sums = tuple(total + x.astype(jnp.float32) for total, x in zip(sums, gradients, strict=True))
        if ring.size > 1:  # gradients travel with their keys; after the last rotation every shard is back on its owner
            key, value, *key_value_sums = ring.rotate(key, value, *sums[1:])
            sums = sums[0], *key_value_sums
        return (key, value, sums), None

    zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (query, key, value))
    # A scan and not an unrolled loop, so that only one hop's arrays exist at a time.
    (_, _, (d_query, d_key, d_value)), _ = jax.lax.scan(visit, (key, value, zeros), jnp.arange(ring.size))
    return (d_query.astype(query.dtype), d_key.astype(key.dtype), d_value.astype(value.dtype), None, None, None)


_ring_attention.defvjp(_forward, _backward)
