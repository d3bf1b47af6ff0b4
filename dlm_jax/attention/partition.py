"""Attention under a mesh: each device attends for its own examples, heads and queries."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec


@dataclasses.dataclass(frozen=True)
class Partition:
    """The mesh axes over which attention's arrays are split."""

    batch: tuple[str, ...]
    heads: str
    length: str


def is_split(partition: Partition | None) -> bool:
    """Whether there is a mesh in use (`jax.set_mesh`) over which arrays are split."""
    return partition is not None and not jax.sharding.get_abstract_mesh().empty


def over_shards(partition: Partition, attention: Callable[..., jax.Array], specs: tuple[Any, ...], query: jax.Array,
                key: jax.Array, value: jax.Array, *beside: Any) -> jax.Array:
    """Runs `attention(query, key, value, *beside)` on each device with what lies there.

    Args:
      specs: how the arrays of `beside` are split, a tree of PartitionSpec for each of them.
      query, key, value: global arrays [batch, length, heads or kv_heads, head_dim]; so is the result.
    """
    split = PartitionSpec(partition.batch, partition.length, partition.heads, None)
    run = jax.shard_map(attention, in_specs=(split, split, split, *specs), out_specs=split, check_vma=False)
    return run(query, key, value, *beside)
