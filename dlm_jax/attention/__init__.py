"""How attention is computed: the mask as a description, and the backends that evaluate it."""

import jax

from dlm_jax.attention.anchored import anchored_attention
from dlm_jax.attention.backend import BACKENDS, AttentionSpec, BackendChoice, choose_backend
from dlm_jax.attention.mask import AttentionMask
from dlm_jax.attention.partition import Partition
from dlm_jax.attention.softcap import soft_cap, soft_cap_gradient
from dlm_jax.attention.xla import xla_attention, xla_block_attention
from dlm_jax.matmul import MatmulKind

__all__ = ["BACKENDS", "AttentionMask", "AttentionSpec", "BackendChoice", "Partition", "anchored_attention", "attend",
           "choose_backend", "soft_cap", "soft_cap_gradient", "xla_attention"]


def attend(query: jax.Array, key: jax.Array, value: jax.Array, mask: AttentionMask, *, backend: str = "auto",
           partition: Partition | None = None, matmul_kind: MatmulKind = "default", dropout_rate: float = 0.0,
           dropout_seeds: jax.Array | None = None, softcap: float | None = None) -> jax.Array:
    """Computes attention by a backend; shapes as in `xla_attention`.

    Args:
      backend: one of BACKENDS, or "auto", the platform's fastest that supports these arguments: see `choose_backend`.
      partition: the mesh axes that split the arrays, for backends that XLA cannot split by itself.
      matmul_kind: how the backend "xla" multiplies matrices.
      softcap: of the scaled scores; see `soft_cap`.

    Raises:
      ConfigError: the backend does not support these arguments.
    """
    drops = dropout_rate > 0 and dropout_seeds is not None
    spec = AttentionSpec(query.dtype.name, query.shape[-1], dropout=drops, matrix=mask.spec.kind == "matrix",
                         softcap=softcap is not None)
    backend = choose_backend(backend, spec).backend
    blocks = mask.spec.kind == "block_diffusion"
    if backend == "cudnn":
        from dlm_jax.attention.cudnn import cudnn_attention, cudnn_block_attention

        return (cudnn_block_attention if blocks else cudnn_attention)(query, key, value, mask, partition=partition)
    options = {"dropout_rate": dropout_rate, "dropout_seeds": dropout_seeds, "softcap": softcap}
    if backend == "tpu":
        from dlm_jax.attention.tpu_ring import tpu_ring_attention  # with Pallas, which other platforms need not import

        return tpu_ring_attention(query, key, value, mask, partition=partition, **options)
    attention = xla_block_attention if blocks else xla_attention
    return attention(query, key, value, mask, matmul_kind=matmul_kind, **options)
