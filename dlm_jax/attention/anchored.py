"""Attention from blocks to a text and to themselves: `AttentionMask.anchored` without most of what it forbids.

A block sees the text before its anchor and no other block. Instead of a square over text and blocks, there are scores
of every query with the text, and a diagonal of blocks; they share one softmax. Blocks are computed a few at a time, and
their scores are recomputed for the gradient, so that no array of the size of all scores exists.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from dlm_jax.attention.mask import AttentionMask
from dlm_jax.attention.xla import FORBIDDEN
from dlm_jax.matmul import MatmulKind, matmul

_QUERIES = 1024  # whose scores exist at one time, at least one block

KeysAndValues = tuple[jax.Array, jax.Array]


def anchored_attention(query: jax.Array, text: KeysAndValues, own: KeysAndValues, mask: AttentionMask, *,
                       matmul_kind: MatmulKind = "default") -> jax.Array:
    """Computes softmax attention with grouped queries, softmax in float32, under a mask of the kind "anchored".

    Args:
      query: [batch, blocks * block_size, heads, head_dim], unscaled.
      text: keys and values [batch, text length, kv_heads, head_dim].
      own: those of the blocks, [batch, blocks * block_size, kv_heads, head_dim].

    Returns:
      [batch, blocks * block_size, heads, head_dim] in the dtype of `query`.
    """
    batch, total = query.shape[:2]
    blocks = mask.anchors.shape[1]
    count = next(n for n in range(1, blocks + 1) if blocks % n == 0 and (total // n <= _QUERIES or n == blocks))
    attend = functools.partial(_attend, text=text, kind=matmul_kind)
    if count == 1:
        return attend(query, own, mask)

    def split(x: jax.Array) -> jax.Array:
        return jnp.swapaxes(x.reshape(batch, count, -1, *x.shape[2:]), 0, 1)

    def part(arrays: tuple[jax.Array, KeysAndValues, jax.Array, jax.Array | None]) -> jax.Array:
        query, own, anchors, segments = arrays
        if segments is not None:
            segments = jnp.concatenate([mask.segment_ids[:, : mask.spec.text_length], segments], axis=1)
        return attend(query, own, dataclasses.replace(mask, anchors=anchors, segment_ids=segments))

    segments = None if mask.segment_ids is None else split(mask.segment_ids[:, mask.spec.text_length :])
    out = jax.lax.map(jax.checkpoint(part, prevent_cse=False),
                      (split(query), jax.tree.map(split, own), split(mask.anchors), segments))
    return jnp.swapaxes(out, 0, 1).reshape(query.shape)


def _attend(query: jax.Array, own: KeysAndValues, mask: AttentionMask, *, text: KeysAndValues,
            kind: MatmulKind) -> jax.Array:
    batch, total, heads, head_dim = query.shape
    length, kv_heads = text[0].shape[1:3]
    size, groups = mask.spec.block_size, heads // kv_heads
    query = query.reshape(batch, total, kv_heads, groups, head_dim).transpose(0, 2, 3, 1, 4) * head_dim**-0.5
    text_key, text_value = (x.astype(query.dtype).transpose(0, 2, 1, 3) for x in text)  # [batch, kv_heads, length, ..]
    rows = (batch, kv_heads, groups * total)  # one group's queries share a matrix

    allowed = mask.allowed(length + jnp.arange(total), jnp.arange(length))[:, None, None]
    scores = matmul(query.reshape(*rows, head_dim), text_key, kind, transpose_b=True)
    scores = jnp.where(allowed, scores.reshape(batch, kv_heads, groups, total, length), FORBIDDEN)

    def to_blocks(x: jax.Array) -> jax.Array:
        """[batch, kv_heads, groups, total, n] to [batch, kv_heads, blocks, groups * size, n]."""
        x = jnp.swapaxes(x.reshape(*x.shape[:3], total // size, size, x.shape[-1]), 2, 3)
        return x.reshape(*x.shape[:3], -1, x.shape[-1])

    def from_blocks(x: jax.Array) -> jax.Array:
        """The inverse of `to_blocks`, for queries."""
        x = jnp.swapaxes(x.reshape(*x.shape[:3], groups, size, x.shape[-1]), 2, 3)
        return x.reshape(*x.shape[:3], total, x.shape[-1])

    own_key, own_value = (to_blocks(x.transpose(0, 2, 1, 3)[:, :, None]) for x in own)
    own_scores = from_blocks(matmul(to_blocks(query), own_key, kind, transpose_b=True))
    own_allowed = jnp.tile(_own_allowed(mask), (total // size, 1))  # [total, size]
    own_scores = jnp.where(own_allowed, own_scores, FORBIDDEN)

    maximum = jnp.maximum(scores.max(axis=-1, keepdims=True), own_scores.max(axis=-1, keepdims=True))
    maximum = jax.lax.stop_gradient(maximum)
    weights, own_weights = jnp.exp(scores - maximum), jnp.exp(own_scores - maximum)
    sums = weights.sum(axis=-1, keepdims=True) + own_weights.sum(axis=-1, keepdims=True)
    out = matmul(weights.astype(text_value.dtype).reshape(*rows, length), text_value, kind)
    out = out.reshape(batch, kv_heads, groups, total, head_dim)
    out += from_blocks(matmul(to_blocks(own_weights.astype(own_value.dtype)), own_value, kind))
    out /= sums
    return out.astype(query.dtype).transpose(0, 3, 1, 2, 4).reshape(batch, total, heads, head_dim)


def _own_allowed(mask: AttentionMask) -> jax.Array:
    """Returns which slots of a block see which, bool [size, size]; it does not depend on the anchor."""
    slots = mask.spec.text_length + jnp.arange(mask.spec.block_size)
    first = jax.tree.map(lambda x: x[0], mask.params())
    spec = dataclasses.replace(mask.spec, segments=False)
    return spec.allowed(slots[:, None], slots[None], first, query_anchors=jnp.int32(0))
