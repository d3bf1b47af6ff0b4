"""Attention over the whole square in plain XLA: the reference every other backend is held to."""

import jax
import jax.numpy as jnp

from dlm_jax.attention.mask import AttentionMask, MaskParams
from dlm_jax.random import dropout

FORBIDDEN = -1e30  # finite, so that a query that may see nothing gives a mean of values and not NaN


def xla_attention(query: jax.Array, key: jax.Array, value: jax.Array, mask: AttentionMask, *,
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


# ---- Attention under a `block_diffusion` mask in plain XLA, without the parts of the square that it disallows.
#
# Of two copies of a text, four squares, a query sees the clean copy or a part of it, and a noised one its own block: that
# is two squares and a diagonal of blocks, whose scores share one softmax.


def xla_block_attention(query: jax.Array, key: jax.Array, value: jax.Array, mask: AttentionMask, *,
                          dropout_rate: float = 0.0, dropout_seeds: jax.Array | None = None) -> jax.Array:
    """`xla_attention` of a mask made by `AttentionMask.block_diffusion`; arguments as there.

    Args:
      query, key, value: [batch, copies x text, heads or kv_heads, head_dim].
    """
    batch, total, heads, head_dim = query.shape
    kv_heads, text, views, size = key.shape[2], mask.text_length, mask.views, mask.block_size
    groups, noised, number = heads // kv_heads, views * text, -(-text // size)
    query = query.reshape(batch, total, kv_heads, groups, head_dim).transpose(0, 2, 3, 1, 4) * head_dim**-0.5
    key, value = (x.transpose(0, 2, 1, 3) for x in (key, value))  # [batch, kv_heads, total, head_dim]

    def blocks(x: jax.Array) -> jax.Array:
        """[..., noised, n] to [..., views, blocks, size, n], the last block filled up with zeros."""
        x = x.reshape(*x.shape[:-2], views, text, x.shape[-1])
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, number * size - text), (0, 0)])
        return x.reshape(*x.shape[:-2], number, size, x.shape[-1])

    def rows(x: jax.Array) -> jax.Array:
        """The way back."""
        x = x.reshape(*x.shape[:-3], number * size, x.shape[-1])[..., :text, :]
        return x.reshape(*x.shape[:-3], noised, x.shape[-1])

    at, clean = jnp.arange(total)[:, None], noised + jnp.arange(text)
    allowed = mask.allowed(at[:, 0], clean)[:, None, None]  # [batch or 1, 1, 1, total, text]
    by_clean = _product("bhgqd,bhkd->bhgqk", query, key[:, :, noised:])
    by_clean = jnp.where(allowed, by_clean, FORBIDDEN)

    own = blocks(at[:noised])[..., 0]  # [views, blocks, size], where the tokens of a block stand; filled up with 0
    inside = blocks(jnp.ones((noised, 1), bool))[..., 0]
    allowed = _pairs(mask, own[..., :, None], own[..., None, :]) & inside[..., None, :]
    block_key, block_value = blocks(key[:, :, :noised]), blocks(value[:, :, :noised])
    by_own = _product("bhgvnqd,bhvnkd->bhgvnqk", blocks(query[:, :, :, :noised]), block_key)
    by_own = rows(jnp.where(allowed[:, None, None], by_own, FORBIDDEN))  # [batch, kv_heads, groups, noised, size]

    top = jnp.max(by_clean, axis=-1, keepdims=True)
    top = jax.lax.stop_gradient(top.at[..., :noised, :].max(jnp.max(by_own, axis=-1, keepdims=True)))
    by_clean, by_own = jnp.exp(by_clean - top), jnp.exp(by_own - top[..., :noised, :])
    sums = jnp.sum(by_clean, axis=-1, keepdims=True)
    sums = sums.at[..., :noised, :].add(jnp.sum(by_own, axis=-1, keepdims=True))

    head, group = jnp.arange(kv_heads)[:, None, None, None], jnp.arange(groups)[:, None, None]
    own_keys = rows(jnp.broadcast_to(own[..., None, :], (*own.shape, size)))
    by_clean = dropout(by_clean, dropout_rate, dropout_seeds, coordinates=(head, group, at, clean))
    by_own = dropout(by_own, dropout_rate, dropout_seeds, coordinates=(head, group, at[:noised], own_keys))

    out = _product("bhgqk,bhkd->bhgqd", by_clean.astype(value.dtype), value[:, :, noised:])
    beside = _product("bhgvnqk,bhvnkd->bhgvnqd", blocks(by_own.astype(value.dtype)), block_value)
    out = out.at[..., :noised, :].add(rows(beside)) / sums
    return out.astype(value.dtype).transpose(0, 3, 1, 2, 4).reshape(batch, total, heads, head_dim)


def _pairs(mask: AttentionMask, q: jax.Array, k: jax.Array) -> jax.Array:
    """The rule on pairs of positions, [batch or 1, ...]."""
    segments = (None, None)
    if mask.segment_ids is not None:
        segments = tuple(mask.segment_ids[:, x] for x in (q, k))
    params = MaskParams(*(x.reshape(-1, *[1] * q.ndim) for x in mask.params()))
    return mask.spec.allowed(q[None], k[None], params, *segments)


def _product(form: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(form, a, b, preferred_element_type=jnp.float32)
