"""How attention is computed: the mask as a description, and the backends that evaluate it."""

import jax

from dlm_jax.attention.dense import dense_attention
from dlm_jax.attention.mask import AttentionMask
from dlm_jax.errors import ConfigError

__all__ = ["BACKENDS", "AttentionMask", "attend", "choose_backend"]

BACKENDS = {"dense": dense_attention}


def choose_backend(name: str = "auto") -> str:
    """The backend that `name` stands for on this platform."""
    if name == "auto":
        return "dense"
    if name not in BACKENDS:
        raise ConfigError(f"unknown attention backend {name!r}; choose auto or one of {', '.join(BACKENDS)}")
    return name


def attend(query: jax.Array, key: jax.Array, value: jax.Array, mask: AttentionMask, *, backend: str = "auto",
           dropout_rate: float = 0.0, dropout_seeds: jax.Array | None = None) -> jax.Array:
    """Attention by the chosen backend; shapes as in `dense_attention`."""
    compute = BACKENDS[choose_backend(backend)]
    return compute(query, key, value, mask, dropout_rate=dropout_rate, dropout_seeds=dropout_seeds)
