"""Kernels that are not trained in 8 or 4 bits: codes, and a float32 scale for each block of them along `embed`.

The arithmetic is qwix's (github.com/google/qwix): `int8`, whose levels are evenly spaced, and `nf4`, the 4-bit
NormalFloat of QLoRA (arXiv 2305.14314). Every projection has the axis `embed`, which tensor parallelism does not split:
the codes of a block lie beside its scale wherever the number of blocks divides.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from dlm_jax.models.lora import contract

_BLOCK = 64  # of QLoRA's weights

# qwix is imported by whoever quantises, and by nobody else: it is young, and may lag behind a new JAX.


def quantised(kernel: nnx.Param, kind: str) -> tuple[nnx.Param, nnx.Param]:
    """Codes with the axes of a stacked kernel, uint4 or int8, and its scales, whose axis `embed` counts blocks.

    Args:
      kind: `int8` or `nf4`.
    """
    codes, scales = _quantise(kernel[...], kernel.axes.index("embed"), kind)
    axes = tuple("embed_blocks" if axis == "embed" else axis for axis in kernel.axes)
    return nnx.Param(codes, axes=kernel.axes), nnx.Param(scales, axes=axes)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _quantise(kernel: jax.Array, axis: int, kind: str) -> tuple[jax.Array, jax.Array]:
    import qwix

    size = kernel.shape[axis]
    block = next(block for block in range(_BLOCK, 0, -1) if size % block == 0)

    def vector(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        found = qwix.quantize(x, kind, tiled_axes={0: block})
        return found.qvalue, found.scale

    def layer(kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
        rows = jnp.moveaxis(kernel.astype(jnp.float32), axis - 1, -1)
        parts = jnp.vectorize(vector, signature="(n)->(n),(b)")(rows)
        return tuple(jnp.moveaxis(part, -1, axis - 1) for part in parts)

    return jax.lax.map(layer, kernel)  # float32, and what qwix makes beside it, of one layer at a time


@jax.jit
def dequantise(codes: jax.Array, scales: jax.Array) -> jax.Array:
    """The float32 kernel of codes and scales, of one layer or of all."""
    import qwix

    kind = {jnp.dtype(jnp.uint4): "nf4", jnp.dtype(jnp.int8): "int8"}[codes.dtype]
    axis = next((d for d in range(codes.ndim) if codes.shape[d] != scales.shape[d]), 0)  # blocks of 1: any will do
    # Vector by vector: qwix flattens what it looks up, which gathers an array that is split, and changes no vector.
    vector = jnp.vectorize(lambda codes, scales: qwix.dequantize(qwix.QArray(codes, scales, None, kind)),
                           signature="(n),(b)->(n)")
    return jnp.moveaxis(vector(jnp.moveaxis(codes, axis, -1), jnp.moveaxis(scales, axis, -1)), -1, axis)


def whole_kernel(kernel: nnx.Variable, scale: nnx.Variable | None) -> jax.Array:
    """The kernel as it is, or dequantised where it is codes."""
    return kernel[...] if scale is None else dequantise(kernel[...], scale[...])


def contract_quantised(x: jax.Array, codes: jax.Array, scales: jax.Array, num_inputs: int, again: bool) -> jax.Array:
    """`contract` with a kernel of one layer.

    Args:
      again: whether the backward pass makes the kernel again; else it keeps it, in the type of `x`. Where the whole
        layer is computed again, that is better left out: a split kernel is then gathered once for both.
    """

    def product(x: jax.Array, codes: jax.Array, scales: jax.Array) -> jax.Array:
        return contract(x, dequantise(codes, scales).astype(x.dtype), num_inputs)

    return (jax.checkpoint(product, prevent_cse=False) if again else product)(x, codes, scales)
