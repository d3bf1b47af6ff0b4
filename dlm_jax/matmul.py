"""Matrix products, with a rule that reaches the bfloat16 units (AMX, AVX512-BF16) of CPUs.

XLA's CPU compiler uses these units only for a product of two bfloat16 matrices whose result is float32 and whose left
operand is contracted along the last axis in memory. It converts the operands of any other product to float32. JAX's own
gradients are such other products, so there are rules for them here. All products of the kind "cpu_bfloat16", forward
and backward, are fast ones, rounded to the operands' dtype afterwards, as PyTorch's CPU kernels do.

Of the kind "default", and for float32, everything here is `jax.lax.dot_general` with JAX's own gradient.
"""

import functools
import math
import os
import pathlib
import re
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

MatmulKind = Literal["default", "cpu_bfloat16"]
DEFAULT, FAST = "default", "cpu_bfloat16"


@functools.cache
def has_bfloat16_units() -> bool:
    """Returns whether XLA, on this CPU and as XLA_FLAGS limit it, multiplies bfloat16 faster than float32."""
    limits = re.findall(r"--xla_cpu_max_isa=(\w+)", os.environ.get("XLA_FLAGS", ""))
    if limits and limits[-1].upper() not in ("AVX512_BF16", "AMX", "AMX_FP16"):
        return False
    try:
        flags = pathlib.Path("/proc/cpuinfo").read_text().split("processor", 2)[1].split()
    except (OSError, IndexError):
        return False
    return "amx_bf16" in flags or "avx512_bf16" in flags


def resolve_dtype(dtype: str, platform: str, num_devices: int) -> str:
    """Returns the compute dtype that "auto" means: bfloat16 where it is faster than float32; others as they are."""
    if dtype != "auto":
        return dtype
    return "bfloat16" if platform != "cpu" or choose_matmul("bfloat16", platform, num_devices) == FAST else "float32"


def choose_matmul(dtype: str, platform: str, num_devices: int) -> MatmulKind:
    """Returns the kind of product for a model of a compute `dtype` on devices of a platform.

    On several devices it is "default": the partitioner does not know the layouts that the fast kind asks for.
    """
    fast = dtype == "bfloat16" and platform == "cpu" and num_devices == 1 and has_bfloat16_units()
    return FAST if fast else DEFAULT


def compiler_options(kind: MatmulKind) -> dict[str, str]:
    """Returns options for `jax.jit` of a program that loops over layers.

    XLA's CPU compiler computes every bfloat16 operation but products in float32, even reading a slice and updating one:
    an update of one layer then rewrites the stack of all layers. Without the first pass they stay bfloat16. The second
    would move conversions of a stack of layers out of the loop: a float32 copy of all kernels, made for each call.
    """
    passes = "float-normalization-bf16", "while-loop-invariant-code-motion"
    return {} if kind == DEFAULT else {"xla_disable_hlo_passes": ",".join(passes)}


def jit_model(function: Callable, **settings: object) -> Callable:
    """Returns `function(graphdef, params, ...)` jitted, with the compiler options of its parameters' kind of product.

    Args:
      settings: of `jax.jit`.
    """
    @functools.cache
    def program(kind: MatmulKind) -> Callable:
        return jax.jit(function, compiler_options=compiler_options(kind), **settings)

    @functools.wraps(function)
    def call(graphdef: object, params: object, *args: object, **kwargs: object) -> object:
        leaves = jax.tree.leaves(params)
        kind = DEFAULT
        if leaves:
            kind = choose_matmul(leaves[0].dtype.name, jax.default_backend(), len(leaves[0].devices()))
        return program(kind)(graphdef, params, *args, **kwargs)

    call.program = program
    return call


def dense(x: jax.Array, kernel: jax.Array, num_inputs: int, kind: MatmulKind) -> jax.Array:
    """Contracts the last `num_inputs` dimensions of `x` with the first of `kernel` [*inputs, *outputs]."""
    if _is_fast(x, kernel, kind):
        return _dense(x, kernel, num_inputs)
    contracted = tuple(range(x.ndim - num_inputs, x.ndim)), tuple(range(num_inputs))
    return lax.dot_general(x, kernel, (contracted, ((), ())))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _dense(x: jax.Array, kernel: jax.Array, num_inputs: int) -> jax.Array:
    y = product(*_matrices(x, kernel, num_inputs), -1, -2, FAST)
    return y.reshape(*x.shape[: x.ndim - num_inputs], *kernel.shape[num_inputs:]).astype(x.dtype)


def _dense_backward(num_inputs: int, saved: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    rows, matrix = _matrices(x, kernel, num_inputs)
    g = g.reshape(rows.shape[0], -1)
    dx, dkernel = product(g, matrix, -1, -1, FAST), product(rows, g, -2, -2, FAST)
    return dx.reshape(x.shape).astype(x.dtype), dkernel.reshape(kernel.shape).astype(kernel.dtype)


def _matrices(x: jax.Array, kernel: jax.Array, num_inputs: int) -> tuple[jax.Array, jax.Array]:
    """Returns `x` as [rows, inputs] and `kernel` as [inputs, outputs]."""
    inputs = math.prod(kernel.shape[:num_inputs])
    return x.reshape(-1, inputs), kernel.reshape(inputs, -1)


# What is saved are the arguments themselves: a loop over layers then stores no second copy of its kernels.
_dense.defvjp(lambda x, kernel, num_inputs: (_dense(x, kernel, num_inputs), (x, kernel)), _dense_backward)


def matmul(a: jax.Array, b: jax.Array, kind: MatmulKind, *, transpose_b: bool = False) -> jax.Array:
    """Computes a @ b, or with `transpose_b` a @ b^T, in float32.

    Args:
      a: [*batch, M, K].
      b: [*batch, K, N], or [*batch, N, K] with `transpose_b`.

    Returns:
      float32 [*batch, M, N].
    """
    return _matmul(a, b, transpose_b) if _is_fast(a, b, kind) else product(a, b, -1, -1 if transpose_b else -2, kind)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _matmul(a: jax.Array, b: jax.Array, transpose_b: bool) -> jax.Array:
    return product(a, b, -1, -1 if transpose_b else -2, FAST)


def _matmul_backward(transpose_b: bool, saved: tuple[jax.Array, jax.Array],
                     g: jax.Array) -> tuple[jax.Array, jax.Array]:
    a, b = saved
    g = g.astype(a.dtype)
    da = product(g, b, -1, -2 if transpose_b else -1, FAST)
    db = product(g, a, -2, -2, FAST) if transpose_b else product(a, g, -2, -2, FAST)
    return da.astype(a.dtype), db.astype(b.dtype)


_matmul.defvjp(lambda a, b, transpose_b: (_matmul(a, b, transpose_b), (a, b)), _matmul_backward)


def add_bias(y: jax.Array, bias: jax.Array, kind: MatmulKind) -> jax.Array:
    """Computes y + bias, of [..., *outputs] and [*outputs], both of one dtype."""
    return _add_bias(y, bias) if _is_fast(y, bias, kind) else y + bias


@jax.custom_vjp
def _add_bias(y: jax.Array, bias: jax.Array) -> jax.Array:
    return y + bias


def _add_bias_backward(bias: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    # A product with ones: XLA's own sum over rows takes longer than the product that made them.
    rows = g.reshape(-1, bias.size)
    dbias = product(jnp.ones((1, rows.shape[0]), g.dtype), rows, -1, -2, FAST)
    return g, dbias.reshape(bias.shape).astype(bias.dtype)


_add_bias.defvjp(lambda y, bias: (y + bias, bias), _add_bias_backward)


def product(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int, kind: MatmulKind) -> jax.Array:
    """Contracts axis `a_axis` of `a` with `b_axis` of `b`, one of their last two each, into float32.

    It has no rule for gradients of the fast kind.

    Args:
      a, b: [*batch, rows, columns].
    """
    a_axis, b_axis = a_axis % a.ndim, b_axis % b.ndim
    if _is_fast(a, b, kind):
        # Without the constraints, XLA would fold transposes into the product, which puts it on the slow path.
        a, b = _row_major(a), _row_major(b)
        if a_axis == a.ndim - 2:
            a, a_axis = _row_major(jnp.swapaxes(a, -1, -2)), a_axis + 1
        if (rows := a.shape[-2]) < 4:  # XLA converts the matrix of a product with one vector; 2 rows are slower than 4
            padded = jnp.pad(a, ((0, 0),) * (a.ndim - 2) + ((0, 4 - rows), (0, 0)))
            return product(padded, b, a_axis, b_axis, kind)[..., :rows, :]
    batch = tuple(range(a.ndim - 2))
    return lax.dot_general(a, b, (((a_axis,), (b_axis,)), (batch, batch)), preferred_element_type=jnp.float32)


def _row_major(x: jax.Array) -> jax.Array:
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def _is_fast(a: jax.Array, b: jax.Array, kind: MatmulKind) -> bool:
    return kind != DEFAULT and a.dtype == b.dtype == jnp.bfloat16
