"""What tests of several backends need."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # mostly compiles
ON_GPU = jax.default_backend() == "gpu"


def value_and_gradients(attention, tensors, mask):
    """Of the queries that see something: the others may give anything."""
    def loss(query, key, value):
        positions = jnp.arange(query.shape[1])
        seen = mask.allowed(positions, positions).any(-1)[:, :, None, None]
        out = jnp.where(seen, attention(query, key, value, mask), 0).astype(jnp.float32)
        return jnp.sum(out * tensors[3].astype(jnp.float32)), out
    gradients, out = jax.grad(loss, (0, 1, 2), has_aux=True)(*tensors[:3])
    return out, *gradients


def assert_close(found, expected, tolerance):
    for name, x, y in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
        x, y = (np.asarray(z, np.float32) for z in (x, y))
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * np.abs(y).max(), err_msg=name)


def lowered_calls(function, *args):
    """cuDNN's calls in the program for CUDA: the target's name, and how many results it has beside its workspace."""
    text = jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    return [(name, int(results) - 1) for results, name in re.findall(r":(\d+) = stablehlo.custom_call @__cudnn\$(\w+)",
                                                                     text)]
