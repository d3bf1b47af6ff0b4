"""Rotary position embedding in the half-split layout of the HF checkpoints (Su et al., arXiv 2104.09864)."""

import jax
import jax.numpy as jnp
import numpy as np

from dlm_jax.models.config import RopeScaling


def frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """Angular frequencies float32 [head_dim / 2], in radians per position."""
    freqs = 1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim))
    if scaling is None:
        return freqs.astype(np.float32)
    if scaling.kind == "linear":
        return (freqs / scaling.factor).astype(np.float32)
    # llama3: `smooth` is 0 for wavelengths that are stretched whole and 1 for those left alone.
    turns = scaling.original_max_length * freqs / (2 * np.pi)
    smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth = np.clip(smooth, 0.0, 1.0)
    return (freqs * (smooth + (1 - smooth) / scaling.factor)).astype(np.float32)


def rotation(positions: jax.Array, freqs: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine, float32 [batch or 1, length, 1, head_dim / 2], of positions [length] or [batch, length]."""
    angles = jnp.atleast_2d(positions).astype(jnp.float32)[..., None, None] * freqs
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos_sin: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates `x` [batch, length, heads, head_dim] in float32; returns the type of `x`."""
    cos, sin = cos_sin
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
