"""Flash attention for NVIDIA GPUs by cuDNN, which JAX calls.

What cuDNN knows of a mask by itself (`Arguments`) costs nothing. Every other mask is handed over evaluated, as a
boolean square, shared by the heads and, where the mask is, by the batch.

JAX turns that square into a bias, and before 0.11.1 it has cuDNN compute the gradient of every bias: in each layer's
backward pass a sum over the heads, as large as the bias, that nobody asks for. `stop_gradient` does not help, for the
flag that decides (`has_dbias`, in jax/_src/cudnn/fused_attention_stablehlo.py) is set when the call is traced, by
nothing but the presence of a bias. From 0.11.1 on it stays off where the bias comes from a boolean mask alone
(jax-ml/jax#39512); before that only JAX's inner function can be told, which `_without_mask_gradient` does.
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from dlm_jax.attention.mask import AttentionMask
from dlm_jax.attention.partition import Partition, is_split, over_shards


class Arguments(NamedTuple):
    """A mask in the terms of `jax.nn.dot_product_attention`, whose keywords these are."""

    is_causal: bool = False
    local_window_size: tuple[int, int] | None = None  # keys before and after a query
    key_value_seq_lengths: jax.Array | None = None  # int32 [batch]
    mask: jax.Array | None = None  # bool [batch or 1, 1, Q, K]


def cudnn_arguments(mask: AttentionMask, batch: int, q_len: int, k_len: int, *, split: bool = False) -> Arguments:
    """What to tell cuDNN of a mask; `split`: it will meet a part of the queries, and cannot know which.

    cuDNN itself knows causal masks, with a window or with lengths, and bidirectional ones, with lengths.
    """
    causal = mask.kind == "causal" and q_len == k_len and not split
    if mask.segment_ids is None and (causal or mask.kind == "bidirectional"):
        if mask.window is None and mask.lengths is None:
            return Arguments(causal)
        if mask.window is None:  # no more than there are, for cuDNN would read on
            return Arguments(causal, key_value_seq_lengths=jnp.minimum(jnp.broadcast_to(mask.lengths, (batch,)), k_len))
        if causal and mask.lengths is None:
            return Arguments(causal, local_window_size=(mask.window - 1, 0))
    return Arguments(causal, mask=mask.allowed(jnp.arange(q_len), jnp.arange(k_len))[:, None])


def cudnn_attention(query: jax.Array, key: jax.Array, value: jax.Array, mask: AttentionMask, *,
                    partition: Partition | None = None, implementation: str = "cudnn") -> jax.Array:
    """`xla_attention` without dropout, but for a query that sees nothing, which gives anything finite here.

    Lengths are at least 1. Queries at or past them see what precedes them, as everywhere, and mean nothing.

    A mask that cuDNN does not know by itself (annealed, block-causal, segments, a window on both sides) costs the
    memory of its square as a bias: length^2 x 2 bytes an example, or once where the batch shares it. The layers of a
    network share it too: a scan over them keeps one for all, and under rematerialisation it lives while a layer runs.
    Where the mesh splits the length, a device holds the rows of its queries, and gathers keys and values of all.

    Args:
      query: [batch, Q, heads, head_dim] bfloat16 or float16, already free of any scale.
      key, value: [batch, K, kv_heads, head_dim]; heads is a multiple of kv_heads.
      partition: how the arrays are split over the mesh in use; None: they are not, or JAX is to see to it.
      implementation: "xla" runs the same arguments without cuDNN, in any type, for tests.

    Returns:
      [batch, Q, heads, head_dim] in the type of `query`.
    """
    arguments = cudnn_arguments(mask, query.shape[0], query.shape[1], key.shape[1], split=splits_length(partition))
    return attend_by(arguments, query, key, value, partition=partition, implementation=implementation)


def splits_length(partition: Partition | None) -> bool:
    """Whether the mesh in use splits the length."""
    return is_split(partition) and jax.sharding.get_abstract_mesh().shape[partition.length] > 1


def attend_by(arguments: Arguments, query: jax.Array, key: jax.Array, value: jax.Array, *,
              partition: Partition | None = None, implementation: str = "cudnn") -> jax.Array:
    """`cudnn_attention` of a mask in cuDNN's terms, of all queries and keys."""
    if not is_split(partition):
        return _attention(query, key, value, arguments, implementation)
    rows, length = partition.batch, partition.length
    shared = arguments.mask is not None and arguments.mask.shape[0] == 1
    specs = PartitionSpec(rows), PartitionSpec(None if shared else rows, None, length, None)

    def local(query: jax.Array, key: jax.Array, value: jax.Array, lengths: jax.Array | None,
              allowed: jax.Array | None) -> jax.Array:
        # Not a ring: the logsumexp that JAX hands out is rounded to the output's type, and its gradient is dropped.
        key, value = (jax.lax.all_gather(x, length, axis=1, tiled=True) for x in (key, value))
        here = arguments._replace(key_value_seq_lengths=lengths, mask=allowed)
        return _attention(query, key, value, here, implementation)

    return over_shards(partition, local, specs, query, key, value, arguments.key_value_seq_lengths, arguments.mask)


def _attention(query: jax.Array, key: jax.Array, value: jax.Array, arguments: Arguments,
               implementation: str) -> jax.Array:
    batch, q_len, k_len = query.shape[0], query.shape[1], key.shape[1]
    if q_len % 2 or k_len % 2:  # JAX gives cuDNN's gradients for even lengths only
        query, key, value = (_even(x, 1) for x in (query, key, value))
        if arguments.mask is not None:
            arguments = arguments._replace(mask=_even(_even(arguments.mask, 2), 3))
        elif not arguments.is_causal and arguments.key_value_seq_lengths is None:  # who is causal does not see the end
            arguments = arguments._replace(key_value_seq_lengths=jnp.full(batch, k_len))
    if arguments.mask is not None and implementation == "cudnn" and jax.__version_info__ < (0, 11, 1):
        out = _without_mask_gradient(query, key, value, arguments)
    else:
        out = jax.nn.dot_product_attention(query, key, value, implementation=implementation, **arguments._asdict())
    return out[:, :q_len]


def _even(x: jax.Array, axis: int) -> jax.Array:
    """Filled up to an even length: with zeros, a mask with what nobody sees."""
    return jnp.pad(x, [(0, x.shape[axis] % 2 if i == axis else 0) for i in range(x.ndim)])


def _without_mask_gradient(query: jax.Array, key: jax.Array, value: jax.Array, arguments: Arguments) -> jax.Array:
    """What `jax.nn.dot_product_attention` does with a mask before JAX 0.11.1, with `has_dbias` off."""
    from jax._src.cudnn import fused_attention_stablehlo as inner  # private, so only for releases that will not change

    bias = inner.combine_bias_and_mask(None, arguments.mask, query.dtype)
    kind = inner.MaskType.CAUSAL if arguments.is_causal else inner.MaskType.NO_MASK
    unused = [jnp.zeros(0, query.dtype)] * 6  # lengths, offsets and page tables
    seed, dropout_rate, has_bias, has_dbias, window, return_residual = 0, 0.0, True, False, None, False
    return inner._dot_product_attention(
        query, key, value, bias, *unused, query.shape[-1] ** -0.5, seed, dropout_rate, (has_bias, has_dbias), kind,
        inner.AttentionLayout.BTNH.value, window, inner.check_cudnn_version(), return_residual)


# ---- Attention under a `block_diffusion` mask by cuDNN, almost without the parts of the square that it disallows.
#
# cuDNN computes the whole of a square that it is handed, so it is handed smaller ones. A clean copy that is causal it
# knows by itself. A noised copy goes in pieces of a few blocks, each with its own tokens and the clean ones that its last
# block sees, and a clean one that sees its blocks whole likewise. In units of text^2, eight pieces of a noised copy
# compute 0.13 among themselves and 0.56 with the clean one, whose own square costs 0.5 or, in pieces, 0.56; the whole
# square of two copies has 4, and what is allowed is 1.


_PIECES, _SHORTEST = 8, 128  # shorter pieces would leave a GPU idle


class KeyRange(NamedTuple):
    """A part of a copy, and all that it may see: itself if it is noised, and the clean copy's beginning."""

    own: slice
    keys: tuple[slice, ...]


def pieces(mask: AttentionMask) -> Iterator[KeyRange]:
    """Those of every copy but a causal one, which they fill from the beginning to the end, cut between blocks."""
    text, size = mask.text_length, mask.block_size
    length = -(-max(text // _PIECES, _SHORTEST) // size) * size
    noised = mask.views * text
    for first in range(0, noised + mask.bidirectional_clean * text, text):
        for start in range(0, text, length):
            stop = min(start + length, text)
            own, before = slice(first + start, first + stop), slice(noised, noised + (stop - 1) // size * size)
            yield KeyRange(own, (own, before) if first < noised else (slice(noised, own.stop),))


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
    if not mask.bidirectional_clean:
        text = slice(mask.views * mask.text_length, None)
        causal = AttentionMask.causal().with_window(mask.window)
        if mask.segment_ids is not None:
            causal = causal.with_segments(mask.segment_ids[:, text])
        outputs.append(cudnn_attention(query[:, text], key[:, text], value[:, text], causal, **how))
    return jnp.concatenate(outputs, axis=1)


def _parts(x: jax.Array, parts: tuple[slice, ...], axis: int) -> jax.Array:
    return jnp.concatenate([jax.lax.slice_in_dim(x, part.start, part.stop, axis=axis) for part in parts], axis)
