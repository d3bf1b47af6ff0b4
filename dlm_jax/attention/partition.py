"""Attention under a mesh: each device computes its own examples, heads and queries."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec


@dataclasses.dataclass(frozen=True)
class Partition:
    """The mesh axes over which the arrays of attention, and of experts, are split.

    Attributes:
      heads: also splits the width of an MLP.
      experts: is also one of `batch`.
    """

    batch: tuple[str, ...]
    heads: str
    length: str
    experts: str = "expert"


def is_split(partition: Partition | None) -> bool:
    """Returns whether a mesh is in use (`jax.set_mesh`) over which arrays are split."""
    return partition is not None and not jax.sharding.get_abstract_mesh().empty


def on_shards(partition: Partition, attention: Callable[..., jax.Array], specs: tuple[Any, ...], query: jax.Array,
              key: jax.Array, value: jax.Array, *others: Any) -> jax.Array:
    """Runs `attention(query, key, value, *others)` on each device with its own shards.

    Args:
      specs: one tree of PartitionSpec for each of `others`.
      query, key, value: global arrays [batch, length, heads or kv_heads, head_dim]; so is the result.
    """
    split = PartitionSpec(partition.batch, partition.length, partition.heads, None)
    run = jax.shard_map(attention, in_specs=(split, split, split, *specs), out_specs=split, check_vma=False)
    return run(query, key, value, *others)
