"""Models with random weights by NumPy: a program that draws a model's own initial values takes seconds to compile."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from flax import nnx


def random_model(make: Callable[[], nnx.Module], stddev: float = 0.02, seed: int = 0) -> nnx.Module:
    """Returns the module that `make` makes; its scales are around 1 and all other parameters around 0."""
    graphdef, shapes = nnx.split(nnx.eval_shape(make))
    rng = np.random.default_rng(seed)

    def values(path: tuple, leaf: nnx.Param) -> nnx.Param:
        mean = 1.0 if path[-1] in ("scale", "base") else 0.0  # of a norm, of a convolution
        return leaf.replace(jnp.asarray(rng.normal(mean, stddev, leaf.shape), leaf.dtype))

    return nnx.merge(graphdef, nnx.map_state(values, shapes))
