"""Attention under a `block_diffusion` mask by cuDNN, almost without the parts of the square that it disallows.

cuDNN computes the whole of a square that it is handed, so it is handed smaller ones. A clean copy that is causal it
knows by itself. A noised copy goes in pieces of a few blocks, each with its own tokens and the clean ones that its last
block sees, and a clean one that sees its blocks whole likewise. In units of text^2, eight pieces of a noised copy
compute 0.13 among themselves and 0.56 with the clean one, whose own square costs 0.5 or, in pieces, 0.56; the whole
square of two copies has 4, and what is allowed is 1.
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dlm_jax.attention.cudnn import Arguments, attend_by, cudnn_attention, splits_length
from dlm_jax.attention.mask import AttentionMask
from dlm_jax.attention.partition import Partition

_PIECES, _SHORTEST = 8, 128  # shorter pieces would leave a GPU idle


class Piece(NamedTuple):
    """A part of a copy, and all that it may see: itself if it is noised, and the clean copy's beginning."""

    own: slice
    keys: tuple[slice, ...]


def pieces(mask: AttentionMask) -> Iterator[Piece]:
    """Those of every copy but a causal one, which they fill from the beginning to the end, cut between blocks."""
    text, size = mask.text_length, mask.block_size
    length = -(-max(text // _PIECES, _SHORTEST) // size) * size
    noised = mask.views * text
    for first in range(0, noised + mask.whole_clean * text, text):
        for start in range(0, text, length):
            stop = min(start + length, text)
            own, before = slice(first + start, first + stop), slice(noised, noised + (stop - 1) // size * size)
            yield Piece(own, (own, before) if first < noised else (slice(noised, own.stop),))


def cudnn_block_attention(query: jax.Array, key: jax.Array, value: jax.Array, mask: AttentionMask, *,
                          partition: Partition | None = None, implementation: str = "cudnn") -> jax.Array:
    """`cudnn_attention` of a mask made by `AttentionMask.block_diffusion`; arguments as there.

    Where the mesh splits the length, a device does not have whole pieces, and the whole square is handed over.
    """
    how = {"partition": partition, "implementation": implementation}
    if splits_length(partition):
        return cudnn_attention(query, key, value, mask, **how)
    outputs, at = [], jnp.arange(query.shape[1])
    for own, keys in pieces(mask):
        seen = mask.allowed(at[own], _parts(at, keys, axis=0))
        outputs.append(attend_by(Arguments(mask=seen[:, None]), query[:, own], _parts(key, keys, axis=1),
                                 _parts(value, keys, axis=1), **how))
    if not mask.whole_clean:
        text = slice(mask.views * mask.text_length, None)
        causal = AttentionMask.causal().with_window(mask.window)
        if mask.segment_ids is not None:
            causal = causal.with_segments(mask.segment_ids[:, text])
        outputs.append(cudnn_attention(query[:, text], key[:, text], value[:, text], causal, **how))
    return jnp.concatenate(outputs, axis=1)


def _parts(x: jax.Array, parts: tuple[slice, ...], axis: int) -> jax.Array:
    return jnp.concatenate([jax.lax.slice_in_dim(x, part.start, part.stop, axis=axis) for part in parts], axis)
