"""Attention in plain XLA: the dense reference that every other backend is held to, and a cheaper path for blocks."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dlm_jax.attention.mask import AttentionMask, MaskParams
from dlm_jax.attention.softcap import soft_cap, soft_cap_gradient
from dlm_jax.matmul import MatmulKind, matmul, product
from dlm_jax.random import dropout

FORBIDDEN = -1e30  # finite, so that a query that sees nothing gives a mean of values and not NaN


def xla_attention(query: jax.Array, key: jax.Array, value: jax.Array, mask: AttentionMask, *,
                  dropout_rate: float = 0.0, dropout_seeds: jax.Array | None = None, softcap: float | None = None,
                  query_positions: jax.Array | None = None, matmul_kind: MatmulKind = "default") -> jax.Array:
    """Computes softmax attention with grouped queries over the full square; softmax in float32.

    Args:
      query: [batch, Q, heads, head_dim], unscaled.
      key, value: [batch, K, kv_heads, head_dim]; heads is a multiple of kv_heads.
      dropout_seeds: uint32 [batch], or None for no dropout of the probabilities.
      softcap: of the scaled scores; see `soft_cap`.
      query_positions: int [Q] or [batch, Q], the queries' positions among the keys; None: from 0.
      matmul_kind: how matrices are multiplied; see `dlm_jax.matmul`.

    Returns:
      [batch, Q, heads, head_dim] in the dtype of `query`.
    """
    batch, q_len, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    groups = heads // kv_heads
    # Heads come first, so that both products are plain batched matrix products; one group's queries share a matrix.
    query = query.reshape(batch, q_len, kv_heads, groups, head_dim).transpose(0, 2, 3, 1, 4)
    query = query.reshape(batch, kv_heads, groups * q_len, head_dim) * head_dim**-0.5
    key, value = key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)  # [batch, kv_heads, K, head_dim]
    static = _Static(dropout_rate, groups, softcap, matmul_kind)
    out = _attention(query, key, value, mask, query_positions, dropout_seeds, static)
    out = out.reshape(batch, kv_heads, groups, q_len, head_dim).transpose(0, 3, 1, 2, 4)
    return out.reshape(batch, q_len, heads, head_dim)


class _Static(NamedTuple):
    """The values that a program is compiled for."""

    dropout_rate: float
    groups: int  # query heads per key head
    softcap: float | None
    matmul: MatmulKind


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attention(query: jax.Array, key: jax.Array, value: jax.Array, mask: AttentionMask, positions: jax.Array | None,
               seeds: jax.Array | None, static: _Static) -> jax.Array:
    """Computes attention of [batch, kv_heads, groups x Q, head_dim] queries to [batch, kv_heads, K, head_dim] keys.

    Its gradient recomputes the weights from the scores: no array of the square's size is stored.
    """
    return _attend(query, key, value, mask, positions, seeds, static)[0]


def _attend(query: jax.Array, key: jax.Array, value: jax.Array, mask: AttentionMask, positions: jax.Array | None,
            seeds: jax.Array | None, static: _Static) -> tuple:
    scores = _masked_scores(query, key, mask, positions, static)
    # Softmax is divided by its sum after the product with the values: it then needs no pass over the square.
    maximum = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - maximum)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = _dropout(weights, seeds, static).astype(value.dtype)
    out = (product(weights, value, -1, -2, static.matmul) / total).astype(value.dtype)
    return out, (query, key, value, mask, positions, seeds, out, maximum, total)


def _attend_backward(static: _Static, saved: tuple, g: jax.Array) -> tuple:
    """Computes the gradient of softmax attention, as in FlashAttention-2 (Dao, arXiv 2307.08691, section 2.3)."""
    query, key, value, mask, positions, seeds, out, maximum, total = saved
    kind = static.matmul
    scores = _masked_scores(query, key, mask, positions, static)
    weights = jnp.exp(scores - maximum) / total
    dropped = _dropout(weights, seeds, static).astype(value.dtype)
    dweights = _dropout(product(g, value, -1, -1, kind), seeds, static)
    mean = jnp.sum(g.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)
    dscores = soft_cap_gradient(weights * (dweights - mean), scores, static.softcap)
    dscores = jnp.where(scores > FORBIDDEN, dscores, 0).astype(key.dtype)
    grads = (product(dscores, key, -1, -2, kind), product(dscores, query, -2, -2, kind),
             product(dropped, g, -2, -2, kind))
    return *(grad.astype(x.dtype) for grad, x in zip(grads, (query, key, value), strict=True)), None, None, None


_attention.defvjp(_attend, _attend_backward)


def _masked_scores(query: jax.Array, key: jax.Array, mask: AttentionMask, positions: jax.Array | None,
                   static: _Static) -> jax.Array:
    """Returns scores float32 [batch, kv_heads, groups x Q, K]."""
    scores, groups = soft_cap(product(query, key, -1, -1, static.matmul), static.softcap), static.groups
    spec = mask.spec
    if spec.kind == "bidirectional" and not (spec.window or spec.segments or spec.lengths):
        return scores
    q_len = query.shape[2] // groups
    allowed = mask.allowed(jnp.arange(q_len) if positions is None else positions, jnp.arange(key.shape[2]))
    split = scores.reshape(*scores.shape[:2], groups, q_len, -1)
    return jnp.where(allowed[:, None, None], split, FORBIDDEN).reshape(scores.shape)  # allowed: [batch or 1, Q, K]


def _dropout(weights: jax.Array, seeds: jax.Array | None, static: _Static) -> jax.Array:
    """Drops weights [batch, kv_heads, groups x Q, K] by their coordinates; linear, so also the rule of its gradient."""
    split = weights.reshape(*weights.shape[:2], static.groups, -1, weights.shape[-1])
    return dropout(split, static.dropout_rate, seeds).reshape(weights.shape)


def xla_block_attention(query: jax.Array, key: jax.Array, value: jax.Array, mask: AttentionMask, *,
                        dropout_rate: float = 0.0, dropout_seeds: jax.Array | None = None,
                        softcap: float | None = None, matmul_kind: MatmulKind = "default") -> jax.Array:
    """Computes `xla_attention` of a mask from `AttentionMask.block_diffusion` without most of what it forbids.

    Every query may see the clean copy, and a noisy one its own block: instead of a square over all copies these are
    `copies x text` rows against one text, and a diagonal of blocks. Their scores share one softmax.

    Args:
      query, key, value: [batch, copies x text, heads or kv_heads, head_dim]; the others as for `xla_attention`.
    """
    batch, total, heads, head_dim = query.shape
    kv_heads, text, views, size = key.shape[2], mask.spec.text_length, mask.spec.views, mask.spec.block_size
    groups, noised, count = heads // kv_heads, views * text, -(-text // size)
    query = query.reshape(batch, total, kv_heads, groups, head_dim).transpose(0, 2, 3, 1, 4) * head_dim**-0.5
    key, value = (x.transpose(0, 2, 1, 3) for x in (key, value))  # [batch, kv_heads, total, head_dim]

    def to_blocks(x: jax.Array) -> jax.Array:
        """[..., noised, n] to [..., views, blocks, size, n], the last block padded with zeros."""
        x = x.reshape(*x.shape[:-2], views, text, x.shape[-1])
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, count * size - text), (0, 0)])
        return x.reshape(*x.shape[:-2], count, size, x.shape[-1])

    def from_blocks(x: jax.Array) -> jax.Array:
        """The inverse of `to_blocks`."""
        x = x.reshape(*x.shape[:-3], count * size, x.shape[-1])[..., :text, :]
        return x.reshape(*x.shape[:-3], noised, x.shape[-1])

    positions, clean = jnp.arange(total)[:, None], noised + jnp.arange(text)
    allowed = mask.allowed(positions[:, 0], clean)[:, None, None]  # [batch or 1, 1, 1, total, text]
    rows = (batch, kv_heads, groups * total)  # one group's queries share a matrix
    clean_scores = matmul(query.reshape(*rows, head_dim), key[:, :, noised:], matmul_kind, transpose_b=True)
    clean_scores = soft_cap(clean_scores.reshape(batch, kv_heads, groups, total, text), softcap)
    clean_scores = jnp.where(allowed, clean_scores, FORBIDDEN)

    own = to_blocks(positions[:noised])[..., 0]  # [views, blocks, size]: positions by block, padded with 0
    is_token = to_blocks(jnp.ones((noised, 1), bool))[..., 0]
    allowed = _allowed_pairs(mask, own[..., :, None], own[..., None, :]) & is_token[..., None, :]
    block_key, block_value = to_blocks(key[:, :, :noised]), to_blocks(value[:, :, :noised])
    own_scores = _product("bhgvnqd,bhvnkd->bhgvnqk", to_blocks(query[:, :, :, :noised]), block_key)
    own_scores = jnp.where(allowed[:, None, None], soft_cap(own_scores, softcap), FORBIDDEN)
    own_scores = from_blocks(own_scores)  # [.., groups, noised, size]

    maximum = jnp.max(clean_scores, axis=-1, keepdims=True)
    maximum = jax.lax.stop_gradient(maximum.at[..., :noised, :].max(jnp.max(own_scores, axis=-1, keepdims=True)))
    clean_weights, own_weights = jnp.exp(clean_scores - maximum), jnp.exp(own_scores - maximum[..., :noised, :])
    sums = jnp.sum(clean_weights, axis=-1, keepdims=True)
    sums = sums.at[..., :noised, :].add(jnp.sum(own_weights, axis=-1, keepdims=True))

    head, group = jnp.arange(kv_heads)[:, None, None, None], jnp.arange(groups)[:, None, None]
    own_keys = from_blocks(jnp.broadcast_to(own[..., None, :], (*own.shape, size)))
    clean_weights = dropout(clean_weights, dropout_rate, dropout_seeds, coordinates=(head, group, positions, clean))
    own_weights = dropout(own_weights, dropout_rate, dropout_seeds,
                          coordinates=(head, group, positions[:noised], own_keys))

    out = matmul(clean_weights.astype(value.dtype).reshape(*rows, text), value[:, :, noised:], matmul_kind)
    out = out.reshape(batch, kv_heads, groups, total, head_dim)
    own_out = _product("bhgvnqk,bhvnkd->bhgvnqd", to_blocks(own_weights.astype(value.dtype)), block_value)
    out = out.at[..., :noised, :].add(from_blocks(own_out)) / sums
    return out.astype(value.dtype).transpose(0, 3, 1, 2, 4).reshape(batch, total, heads, head_dim)


def _allowed_pairs(mask: AttentionMask, q: jax.Array, k: jax.Array) -> jax.Array:
    """Evaluates the rule on pairs of positions, bool [batch or 1, ...]."""
    segments = (None, None) if mask.segment_ids is None else (mask.segment_ids[:, q], mask.segment_ids[:, k])
    params = MaskParams(*(x.reshape(-1, *[1] * q.ndim) for x in mask.params()))
    return mask.spec.allowed(q[None], k[None], params, *segments)


def _product(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)
