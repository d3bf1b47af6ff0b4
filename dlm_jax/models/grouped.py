"""Products of runs of rows with one matrix each, as a mixture of experts needs them.

On TPUs it is `jax.lax.ragged_dot`. Elsewhere XLA expands that into a product of all rows with all matrices; a loop over
blocks of rows computes here what each matrix's own rows need, and reads no matrix without rows.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

_BLOCK = 256  # rows of a product; a matrix's last block may be partly in vain


def grouped_matmul(rows: jax.Array, matrices: jax.Array, sizes: jax.Array) -> jax.Array:
    """Multiplies the first `sizes[0]` rows by the first matrix, the next `sizes[1]` by the second, and so on.

    Args:
      rows: [rows, inputs], at least as many as the sizes add up to. The results of the rest have no meaning, and they
        have no gradient.
      matrices: [matrices, inputs, outputs].
      sizes: int [matrices].

    Returns:
      [rows, outputs] in the dtype of `rows`.
    """
    return jax.lax.platform_dependent(rows, matrices, sizes, tpu=jax.lax.ragged_dot, default=multiply_by_blocks)


@jax.custom_vjp
def multiply_by_blocks(rows: jax.Array, matrices: jax.Array, sizes: jax.Array) -> jax.Array:
    """Computes `grouped_matmul` one block of rows at a time."""
    block, padded = _padded(rows)

    def visit(start: jax.Array, group: jax.Array, out: jax.Array) -> jax.Array:
        x = jax.lax.dynamic_slice_in_dim(padded, start, block)
        y = _product(x, matrices[group]).astype(rows.dtype)
        # The block may end with rows of the next matrices, whose own blocks come later.
        return jax.lax.dynamic_update_slice_in_dim(out, y, start, axis=0)

    out = jnp.zeros((len(padded), matrices.shape[-1]), rows.dtype)
    return _over_blocks(sizes, block, visit, out)[: len(rows)]


def _forward(rows: jax.Array, matrices: jax.Array, sizes: jax.Array) -> tuple:
    return multiply_by_blocks(rows, matrices, sizes), (rows, matrices, sizes)


def _backward(saved: tuple[jax.Array, ...], gradient: jax.Array) -> tuple:
    rows, matrices, sizes = saved
    (block, padded), (_, gradient) = _padded(rows), _padded(gradient)
    ends = jnp.cumsum(sizes)

    def visit(start: jax.Array, group: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple:
        d_rows, d_matrices = carry
        own = start + jnp.arange(block) < ends[group]
        x, g = (jax.lax.dynamic_slice_in_dim(array, start, block) for array in (padded, gradient))
        g = jnp.where(own[:, None], g, 0)
        d_matrix = jax.lax.dot_general(x, g, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        d_x = _product(g, matrices[group].T).astype(rows.dtype)
        return (jax.lax.dynamic_update_slice_in_dim(d_rows, d_x, start, axis=0),
                d_matrices.at[group].add(d_matrix))

    zeros = jnp.zeros(padded.shape, rows.dtype), jnp.zeros(matrices.shape, jnp.float32)
    d_rows, d_matrices = _over_blocks(sizes, block, visit, zeros)
    return d_rows[: len(rows)], d_matrices.astype(matrices.dtype), None


multiply_by_blocks.defvjp(_forward, _backward)


def _padded(rows: jax.Array) -> tuple[int, jax.Array]:
    """Returns the rows of a block, and the rows with a block more, so that no block ends after them."""
    block = min(_BLOCK, len(rows))
    return block, jnp.pad(rows, ((0, block), (0, 0)))


def _over_blocks(sizes: jax.Array, block: int, visit: Callable, carry: object) -> object:
    """Folds `visit(first row, matrix, carry)` over the blocks of all matrices, in the order of the rows."""
    blocks = -(-sizes // block)
    last, starts = jnp.cumsum(blocks), jnp.cumsum(sizes) - sizes

    def step(index: jax.Array, carry: object) -> object:
        group = jnp.searchsorted(last, index, side="right")
        return visit(starts[group] + (index - last[group] + blocks[group]) * block, group, carry)

    return jax.lax.fori_loop(0, last[-1], step, carry)


def _product(x: jax.Array, matrix: jax.Array) -> jax.Array:
    return jax.lax.dot_general(x, matrix, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
