"""Layers of two types in one scan: some see the full text, the others a sliding window, perhaps with RoPE of their own.

A scan runs one program for all layers. So the masks and the rotations of both types are computed once, before it, and
each layer gets a bool that chooses among them.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp

from dlm_jax.attention import AttentionMask
from dlm_jax.models.config import ModelConfig

Rotation = tuple[jax.Array, jax.Array]  # cosine and sine


class MaskChoice(NamedTuple):
    """The masks of both types of layers, and which of them a layer has."""

    full: AttentionMask
    sliding: AttentionMask
    slides: jax.Array  # bool scalar


def attend_under(mask: AttentionMask | MaskChoice, attend: Callable[[AttentionMask], jax.Array]) -> jax.Array:
    """Returns `attend(mask)` of a layer's mask; only that of its type is computed."""
    if isinstance(mask, AttentionMask):
        return attend(mask)
    return jax.lax.cond(mask.slides, lambda: attend(mask.sliding), lambda: attend(mask.full))


@dataclasses.dataclass(frozen=True)
class LayerTypes:
    """The masks and rotations of a model's layers.

    Attributes:
      full: mask and rotation of layers that see the full text; None: there are none.
      sliding: those of layers with a sliding window; None: there are none.
      slides: bool [layers], which layers have the window.
    """

    full: tuple[AttentionMask, Rotation | None] | None
    sliding: tuple[AttentionMask, Rotation | None] | None
    slides: jax.Array

    @classmethod
    def of(cls, config: ModelConfig, mask: AttentionMask, rotation: Callable[[bool], Rotation | None]) -> Self:
        """Returns the types of a model's layers under a mask.

        Args:
          rotation: returns the rotation of layers with a window (True) or without (False); None without RoPE.
        """
        slides = [layer in config.sliding_layers for layer in range(config.num_layers)]
        full = None if all(slides) else (mask, rotation(False))
        sliding = None
        if any(slides):
            same = full is not None and config.sliding_rope_theta is None
            sliding = mask.with_window(config.sliding_window), full[1] if same else rotation(True)
        return cls(full, sliding, jnp.array(slides))

    def of_layer(self, slides: jax.Array) -> tuple[AttentionMask | MaskChoice, Rotation | None]:
        """Returns what one layer has, `slides` being its element of the attribute."""
        if self.full is None or self.sliding is None:
            return self.full or self.sliding
        (full, rotation), (sliding, other) = self.full, self.sliding
        if other is not rotation:
            rotation = tuple(jnp.where(slides, a, b) for a, b in zip(other, rotation, strict=True))
        return MaskChoice(full, sliding, slides), rotation
