"""How attention is computed: the mask as a description, and the backends that evaluate it."""

import jax

from dlm_jax.attention.dense import dense_attention
from dlm_jax.attention.mask import AttentionMask
from dlm_jax.attention.sharded import Partition, sharded_attention_tpu
from dlm_jax.errors import ConfigError

__all__ = ["BACKENDS", "AttentionMask", "Partition", "attend", "choose_backend"]

BACKENDS = ("dense", "flash_tpu")


def choose_backend(name: str = "auto", platform: str | None = None) -> str:
    """The backend that `name` stands for on a platform, by default that of JAX's first device.

    Raises:
      ConfigError: there is no such backend, or it cannot run there.
    """
    platform = platform or jax.default_backend()
    if name == "auto":
        return "flash_tpu" if platform == "tpu" else "dense"
    if name not in BACKENDS:
        raise ConfigError(f"unknown attention backend {name!r}; choose auto or one of {', '.join(BACKENDS)}")
    if name == "flash_tpu" and platform != "tpu":
        raise ConfigError(f"the attention backend flash_tpu needs a TPU, and these devices are {platform}; choose auto")
    return name


def attend(query: jax.Array, key: jax.Array, value: jax.Array, mask: AttentionMask, *, backend: str = "auto",
           partition: Partition | None = None, dropout_rate: float = 0.0,
           dropout_seeds: jax.Array | None = None) -> jax.Array:
    """Attention by a backend; shapes as in `dense_attention`.

    Args:
      backend: "auto" chooses by the platform, and the dense one for an explicit matrix.
      partition: the mesh axes that split the arrays, for backends that XLA cannot split by itself.
    """
    if backend == "auto":
        backend = "dense" if mask.kind == "matrix" else choose_backend()
    if backend not in BACKENDS:
        choose_backend(backend)  # which says what there is
    if backend == "dense":
        return dense_attention(query, key, value, mask, dropout_rate=dropout_rate, dropout_seeds=dropout_seeds)
    return sharded_attention_tpu(query, key, value, mask, partition=partition, dropout_rate=dropout_rate,
                                 dropout_seeds=dropout_seeds)
