"""Flash attention for NVIDIA GPUs by cuDNN, through JAX.

A mask that cuDNN knows (`MaskArguments`) costs nothing. Every other mask is evaluated to a boolean square, shared by
the heads and, where the mask is, by the batch.

JAX turns that square into a bias. Before 0.11.1 it also has cuDNN compute the gradient of every bias: in each layer's
backward pass a sum over the heads, as large as the bias, that nobody needs. `stop_gradient` does not help: the flag
`has_dbias` (in jax/_src/cudnn/fused_attention_stablehlo.py) is set at tracing, by the presence of a bias alone. From
0.11.1 on it stays off for a boolean mask (jax-ml/jax#39512); before that `_without_mask_gradient` calls JAX's inner
function.
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from dlm_jax.attention.mask import AttentionMask
from dlm_jax.attention.partition import Partition, is_split, on_shards

_MAX_CHUNKS, _MIN_CHUNK = 8, 128  # chunks per copy of a text, and their least length: shorter ones leave a GPU idle


class MaskArguments(NamedTuple):
    """A mask as the keywords of `jax.nn.dot_product_attention`."""

    is_causal: bool = False
    local_window_size: tuple[int, int] | None = None  # keys before and after a query
    key_value_seq_lengths: jax.Array | None = None  # int32 [batch]
    mask: jax.Array | None = None  # bool [batch or 1, 1, Q, K]


class QueryChunk(NamedTuple):
    """A range of queries in one copy of a text, and the ranges of keys that contain all they may see."""

    queries: slice
    keys: tuple[slice, ...]


def cudnn_attention(query: jax.Array, key: jax.Array, value: jax.Array, mask: AttentionMask, *,
                    partition: Partition | None = None, implementation: str = "cudnn") -> jax.Array:
    """Computes `xla_attention` without dropout; a query that sees nothing gives any finite value here.

    Lengths are at least 1. Queries at or past them have no meaning.

    A mask that cuDNN does not know (annealed, block-causal, segments, a window on both sides) costs the memory of its
    square as a bias: length^2 x 2 bytes per example, or once where the batch shares it. All layers share it: a scan
    over them keeps one, and under rematerialization it exists only while a layer runs. Where the mesh splits the
    length, a device holds the rows of its queries and gathers the keys and values of all.

    Args:
      query: [batch, Q, heads, head_dim] bfloat16 or float16, unscaled.
      key, value: [batch, K, kv_heads, head_dim]; heads is a multiple of kv_heads.
      partition: how the arrays are split over the mesh in use; None: they are not, or XLA splits them.
      implementation: "xla" runs the same arguments without cuDNN, in any dtype, for tests.

    Returns:
      [batch, Q, heads, head_dim] in the dtype of `query`.
    """
    arguments = mask_arguments(mask, query.shape[0], query.shape[1], key.shape[1], split=_splits_length(partition))
    return _attend(arguments, query, key, value, partition, implementation)


def cudnn_block_attention(query: jax.Array, key: jax.Array, value: jax.Array, mask: AttentionMask, *,
                          partition: Partition | None = None, implementation: str = "cudnn") -> jax.Array:
    """Computes `cudnn_attention` of a mask from `AttentionMask.block_diffusion` without most of what it forbids.

    cuDNN computes the full square that it gets, so it gets smaller ones: a causal clean copy as such, and a noised copy
    or a clean one with bidirectional blocks as `query_chunks`. In units of text^2, eight chunks of a noised copy
    compute 0.13 within the copy and 0.56 with the clean one, whose own square costs 0.5, or 0.56 in chunks. The full
    square of two copies has 4, of which 1 is allowed. Where the mesh splits the length, no device has full chunks, and
    the full square is computed.

    Args:
      query, key, value: [batch, copies x text, heads or kv_heads, head_dim]; the others as for `cudnn_attention`.
    """
    if _splits_length(partition):
        return cudnn_attention(query, key, value, mask, partition=partition, implementation=implementation)
    outputs, positions = [], jnp.arange(query.shape[1])
    for queries, keys in query_chunks(mask):
        allowed = mask.allowed(positions[queries], _gather(positions, keys, axis=0))
        outputs.append(_attend(MaskArguments(mask=allowed[:, None]), query[:, queries], _gather(key, keys, axis=1),
                               _gather(value, keys, axis=1), partition, implementation))
    if not mask.spec.bidirectional_clean:
        clean = slice(mask.spec.views * mask.spec.text_length, None)
        causal = AttentionMask.causal().with_window(mask.spec.window)
        if mask.segment_ids is not None:
            causal = causal.with_segments(mask.segment_ids[:, clean])
        outputs.append(cudnn_attention(query[:, clean], key[:, clean], value[:, clean], causal, partition=partition,
                                       implementation=implementation))
    return jnp.concatenate(outputs, axis=1)


def mask_arguments(mask: AttentionMask, batch: int, q_len: int, k_len: int, *, split: bool = False) -> MaskArguments:
    """Translates a mask for cuDNN, which knows causal masks with a window or lengths, and bidirectional with lengths.

    Args:
      split: a device computes only some of the queries, and cuDNN cannot know which.
    """
    spec = mask.spec
    causal = spec.kind == "causal" and q_len == k_len and not split
    if not spec.segments and (causal or spec.kind == "bidirectional"):
        if spec.window is None and not spec.lengths:
            return MaskArguments(causal)
        if spec.window is None:  # clipped to k_len: cuDNN would read past the end
            lengths = jnp.minimum(jnp.broadcast_to(mask.lengths, (batch,)), k_len)
            return MaskArguments(causal, key_value_seq_lengths=lengths)
        if causal and not spec.lengths:
            return MaskArguments(causal, local_window_size=(spec.window - 1, 0))
    return MaskArguments(causal, mask=mask.allowed(jnp.arange(q_len), jnp.arange(k_len))[:, None])


def query_chunks(mask: AttentionMask) -> Iterator[QueryChunk]:
    """Yields chunks of a few blocks that cover every copy but a causal clean one, in order.

    A noised chunk sees its own tokens, and the clean ones before its last block; a clean one all clean tokens up to its
    end.
    """
    text, size, views = mask.spec.text_length, mask.spec.block_size, mask.spec.views
    length = -(-max(text // _MAX_CHUNKS, _MIN_CHUNK) // size) * size
    clean = views * text
    for first in range(0, clean + mask.spec.bidirectional_clean * text, text):
        for start in range(0, text, length):
            stop = min(start + length, text)
            queries = slice(first + start, first + stop)
            before = slice(clean, clean + (stop - 1) // size * size)
            yield QueryChunk(queries, (queries, before) if first < clean else (slice(clean, queries.stop),))


def _splits_length(partition: Partition | None) -> bool:
    return is_split(partition) and jax.sharding.get_abstract_mesh().shape[partition.length] > 1


def _attend(arguments: MaskArguments, query: jax.Array, key: jax.Array, value: jax.Array, partition: Partition | None,
            implementation: str) -> jax.Array:
    """Attends under a mesh, if one is in use."""
    if not is_split(partition):
        return _attend_locally(arguments, query, key, value, implementation)
    batch, length = partition.batch, partition.length
    shared = arguments.mask is not None and arguments.mask.shape[0] == 1
    specs = PartitionSpec(batch), PartitionSpec(None if shared else batch, None, length, None)

    def local(query: jax.Array, key: jax.Array, value: jax.Array, lengths: jax.Array | None,
              allowed: jax.Array | None) -> jax.Array:
        # Not a ring: JAX rounds the logsumexp to the output's dtype, and drops its gradient.
        key, value = (jax.lax.all_gather(x, length, axis=1, tiled=True) for x in (key, value))
        shard = arguments._replace(key_value_seq_lengths=lengths, mask=allowed)
        return _attend_locally(shard, query, key, value, implementation)

    return on_shards(partition, local, specs, query, key, value, arguments.key_value_seq_lengths, arguments.mask)


def _attend_locally(arguments: MaskArguments, query: jax.Array, key: jax.Array, value: jax.Array,
                    implementation: str) -> jax.Array:
    batch, q_len, k_len = query.shape[0], query.shape[1], key.shape[1]
    if q_len % 2 or k_len % 2:  # JAX has cuDNN's gradients for even lengths only
        query, key, value = (_pad_to_even(x, 1) for x in (query, key, value))
        if arguments.mask is not None:
            arguments = arguments._replace(mask=_pad_to_even(_pad_to_even(arguments.mask, 2), 3))
        elif not arguments.is_causal and arguments.key_value_seq_lengths is None:
            # A causal query never attends to the padded tail; any other is kept from it by lengths.
            arguments = arguments._replace(key_value_seq_lengths=jnp.full(batch, k_len))
    if arguments.mask is not None and implementation == "cudnn" and jax.__version_info__ < (0, 11, 1):
        out = _without_mask_gradient(query, key, value, arguments)
    else:
        out = jax.nn.dot_product_attention(query, key, value, implementation=implementation, **arguments._asdict())
    return out[:, :q_len]


def _without_mask_gradient(query: jax.Array, key: jax.Array, value: jax.Array, arguments: MaskArguments) -> jax.Array:
    """Does what `jax.nn.dot_product_attention` does with a mask before JAX 0.11.1, with `has_dbias` off."""
    from jax._src.cudnn import fused_attention_stablehlo as inner  # private: only for versions that will not change

    bias = inner.combine_bias_and_mask(None, arguments.mask, query.dtype)
    kind = inner.MaskType.CAUSAL if arguments.is_causal else inner.MaskType.NO_MASK
    unused = [jnp.zeros(0, query.dtype)] * 6  # lengths, offsets and page tables
    seed, dropout_rate, has_bias, has_dbias, window, return_residual = 0, 0.0, True, False, None, False
    return inner._dot_product_attention(
        query, key, value, bias, *unused, query.shape[-1] ** -0.5, seed, dropout_rate, (has_bias, has_dbias), kind,
        inner.AttentionLayout.BTNH.value, window, inner.check_cudnn_version(), return_residual)


def _pad_to_even(x: jax.Array, axis: int) -> jax.Array:
    """Pads an axis to an even length, with zeros or, in a mask, with forbidden pairs."""
    return jnp.pad(x, [(0, x.shape[axis] % 2 if i == axis else 0) for i in range(x.ndim)])


def _gather(x: jax.Array, ranges: tuple[slice, ...], axis: int) -> jax.Array:
    return jnp.concatenate([jax.lax.slice_in_dim(x, r.start, r.stop, axis=axis) for r in ranges], axis)
