"""Attention over the whole square in plain XLA: the reference every other backend is held to."""

import jax
import jax.numpy as jnp

from dlm_jax.attention.hashing import dropout
from dlm_jax.attention.mask import AttentionMask

FORBIDDEN = -1e30  # finite, so that a query that may see nothing gives a mean of values and not NaN


def dense_attention(query: jax.Array, key: jax.Array, value: jax.Array, mask: AttentionMask, *,
                    dropout_rate: float = 0.0, dropout_seeds: jax.Array | None = None,
                    query_positions: jax.Array | None = None) -> jax.Array:
    """Softmax attention with grouped queries; softmax in float32.

    Args:
      query: [batch, Q, heads, head_dim], already free of any scale.
      key, value: [batch, K, kv_heads, head_dim]; heads is a multiple of kv_heads.
      dropout_seeds: uint32 [batch], or None for no dropout of the probabilities.
      query_positions: int [Q] or [batch, Q], where the queries stand among the keys; None: from 0 on.

    Returns:
      [batch, Q, heads, head_dim] in the type of `query`.
    """
    batch, q_len, heads, head_dim = query.shape
    k_len, kv_heads = key.shape[1], key.shape[2]
    groups = heads // kv_heads
    # Heads lead, so that both products are plain batched matrix products; the queries of one group share a matrix.
    query = query.reshape(batch, q_len, kv_heads, groups, head_dim).transpose(0, 2, 3, 1, 4)
    query = query.reshape(batch, kv_heads, groups * q_len, head_dim) * head_dim**-0.5
    key, value = key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)  # [batch, kv_heads, K, head_dim]

    scores = jnp.einsum("bhqd,bhkd->bhqk", query, key, preferred_element_type=jnp.float32)
    scores = scores.reshape(batch, kv_heads, groups, q_len, k_len)
    if mask.kind != "bidirectional" or mask.window or mask.segment_ids is not None or mask.lengths is not None:
        positions = jnp.arange(q_len) if query_positions is None else query_positions
        allowed = mask.allowed(positions, jnp.arange(k_len))  # [batch or 1, Q, K]
        scores = jnp.where(allowed[:, None, None], scores, FORBIDDEN)
    # Softmax, divided by its sum after the product with the values: its gradient then needs no sum over the square.
    top = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.exp(scores - top)
    total = jnp.sum(weights, axis=-1, keepdims=True).reshape(batch, kv_heads, groups * q_len, 1)
    weights = dropout(weights, dropout_rate, dropout_seeds)

    weights = weights.reshape(batch, kv_heads, groups * q_len, k_len).astype(value.dtype)
    out = jnp.einsum("bhqk,bhkd->bhqd", weights, value, preferred_element_type=jnp.float32) / total
    out = out.astype(value.dtype)
    out = out.reshape(batch, kv_heads, groups, q_len, head_dim).transpose(0, 3, 1, 2, 4)
    return out.reshape(batch, q_len, heads, head_dim)
