"""How attention is computed: the mask as a description, and the backends that evaluate it."""

import jax

from dlm_jax.attention.backend import BACKENDS, AttentionSpec, Choice, choose_backend
from dlm_jax.attention.cudnn import cudnn_attention, cudnn_block_attention
from dlm_jax.attention.mask import AttentionMask
from dlm_jax.attention.partition import Partition
from dlm_jax.attention.tpu_ring import tpu_ring_attention
from dlm_jax.attention.xla import xla_attention, xla_block_attention

__all__ = ["BACKENDS", "AttentionMask", "Blocks", "Choice", "Partition", "AttentionSpec", "attend", "choose_backend"]


def attend(query: jax.Array, key: jax.Array, value: jax.Array, mask: AttentionMask, *, backend: str = "auto",
           partition: Partition | None = None, dropout_rate: float = 0.0,
           dropout_seeds: jax.Array | None = None) -> jax.Array:
    """Attention by a backend; shapes as in `xla_attention`.

    Args:
      backend: "auto" chooses by the platform, and among what can do this work: see `choose_backend`.
      partition: the mesh axes that split the arrays, for backends that XLA cannot split by itself.

    Raises:
      ConfigError: the backend cannot do this work.
    """
    drops = dropout_rate > 0 and dropout_seeds is not None
    work = AttentionSpec(query.dtype.name, query.shape[-1], dropout=drops, matrix=mask.kind == "matrix")
    backend = choose_backend(backend, work).backend
    blocks = mask.kind == "block_diffusion"
    if backend == "cudnn":
        return (cudnn_block_attention if blocks else cudnn_attention)(query, key, value, mask, partition=partition)
    if backend == "tpu":
        return tpu_ring_attention(query, key, value, mask, partition=partition, dropout_rate=dropout_rate,
                                     dropout_seeds=dropout_seeds)
    dense = xla_block_attention if blocks else xla_attention
    return dense(query, key, value, mask, dropout_rate=dropout_rate, dropout_seeds=dropout_seeds)
