"""The keys and values a decoder keeps, so that a later call computes some positions and sees all."""

from typing import NamedTuple, Self

import jax
import jax.numpy as jnp

from dlm_jax.models.config import ModelConfig


class Cache(NamedTuple):
    """Keys and values of every layer, [layers, batch, length, kv_heads, head_dim]."""

    key: jax.Array
    value: jax.Array

    @classmethod
    def empty(cls, config: ModelConfig, batch: int, length: int, dtype: str) -> Self:
        """A cache in which nothing has been written; whoever attends to it must mask what has not."""
        shape = (config.num_layers, batch, length, config.num_kv_heads, config.head_dim)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    def write(self, layer: jax.Array, positions: jax.Array, key: jax.Array, value: jax.Array) -> Self:
        """Puts keys and values [batch, Q, kv_heads, head_dim] at int `positions` [batch, Q]; past the end: dropped."""
        rows = jnp.arange(key.shape[0])[:, None]
        return Cache(*(whole.at[layer, rows, positions].set(part.astype(whole.dtype), mode="drop")
                       for whole, part in zip(self, (key, value), strict=True)))

    def read(self, layer: jax.Array) -> tuple[jax.Array, jax.Array]:
        """One layer's keys and values, [batch, length, kv_heads, head_dim]."""
        return self.key[layer], self.value[layer]


class Memory(NamedTuple):
    """What one layer's attention is told of a cache: which layer it is, and where its queries stand, int [batch, Q]."""

    cache: Cache
    layer: jax.Array
    positions: jax.Array
