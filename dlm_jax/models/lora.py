"""LoRA (Hu et al., arXiv 2106.09685): a kernel stays as it is, and a product of two thin matrices is learned beside it.
DoRA (Liu et al., arXiv 2402.09353) learns, of the sum's column for each output, the norm apart from the direction.

What is trained is told from what is not by type: a `LoRAParam` is, any other parameter of a model with LoRA is not.
"""

import dataclasses
import functools
import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx

from dlm_jax.errors import ConfigError
from dlm_jax.random import dropout

if TYPE_CHECKING:
    from dlm_jax.models.layers import Initializer


QUANTIZED = ("int8", "nf4")
TARGETS = ("q", "k", "v", "out", "gate", "up", "down")  # the projections of a block


class LoRAParam(nnx.Param):
    """A parameter that a model with LoRA trains: a factor, or a whole table."""


class LoRAFactor(LoRAParam):
    """One of the two matrices beside a kernel, or DoRA's magnitudes; the base does not have it."""


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """What is learned beside a frozen model.

    Attributes:
      rank: of the products, at most each kernel's smaller side.
      alpha: the products count alpha / rank, or under `rslora` alpha / sqrt(rank) (arXiv 2312.03732).
      dropout: share of a factor's inputs that training drops.
      targets: projections that get factors, of TARGETS.
      dora: whether the norm of each output's column is learned too.
      embedding, head: whether the whole table is trained; a tied head is the embedding.
      frozen_dtype: type in which matrices that are not trained are stored; QUANTIZED are those of the blocks alone,
        beside tables in bfloat16.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    targets: tuple[str, ...] = TARGETS
    embedding: bool = False
    head: bool = False
    rslora: bool = False
    dora: bool = False
    frozen_dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0:
            raise ConfigError(f"lora.rank and lora.alpha must be positive, got {self.rank} and {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"lora.dropout must lie in [0, 1), got {self.dropout}")
        unknown = [name for name in self.targets if name not in TARGETS]
        if unknown or not self.targets:
            raise ConfigError(f"lora.targets {','.join(unknown) or '(none)'} are not projections of this model; choose "
                              f"of {', '.join(TARGETS)}")
        if self.frozen_dtype not in ("float32", "bfloat16", *QUANTIZED):
            raise ConfigError(f"lora.frozen_dtype {self.frozen_dtype!r} is unknown; choose float32, bfloat16, "
                              f"{' or '.join(QUANTIZED)}")

    @property
    def scale(self) -> float:
        """By what a product is multiplied."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def quantized(self) -> bool:
        """Whether kernels that are not trained are stored as codes and scales."""
        return self.frozen_dtype in QUANTIZED

    @property
    def read_dtype(self) -> str:
        """Type of matrices that are not trained before any is quantized; the tables stay in it."""
        return "bfloat16" if self.quantized else self.frozen_dtype


class LoRAParams(nnx.Module):
    """`a` [layers, *inputs, rank] and `b` [layers, rank, *outputs] beside a kernel [layers, *inputs, *outputs].

    `a` is uniform within 1 / sqrt(number of inputs), which is Kaiming's with the slope sqrt(5) that PEFT takes, and `b`
    is zero, so that a new model computes what its base does. So does `magnitude` [layers, *outputs], which DoRA adds,
    once it has been set to the norms of the base's kernel.
    """

    def __init__(self, name: str, shape: tuple[int, ...], axes: tuple[str | None, ...], num_inputs: int,
                 lora: LoRAConfig, init: "Initializer"):
        layers, inputs, outputs = shape[0], shape[1 : 1 + num_inputs], shape[1 + num_inputs :]
        for side, size in (("inputs", math.prod(inputs)), ("outputs", math.prod(outputs))):
            if lora.rank > size:
                raise ConfigError(f"lora.rank {lora.rank} is larger than the {size} {side} of the projection {name!r}; "
                                  f"choose at most {size}, or leave {name!r} out of lora.targets")
        self.num_inputs, self.lora, self.site = num_inputs, lora, TARGETS.index(name)
        self.a = init.factor((layers, *inputs, lora.rank), (*axes[: 1 + num_inputs], "rank"),
                             math.prod(inputs) ** -0.5)
        self.b = init.factor((layers, lora.rank, *outputs), ("layers", "rank", *axes[1 + num_inputs :]), 0.0)
        whole = tuple(None if axis == "embed" else axis for axis in axes[1 + num_inputs :])  # as a bias is
        self.magnitude = init.factor((layers, *outputs), ("layers", *whole), 0.0) if lora.dora else None

    def __call__(self, x: jax.Array, seeds: jax.Array | None) -> jax.Array:
        """What is added to the projection of `x` [batch, ..., *inputs]; `seeds` uint32 [batch] for the dropout."""
        x = dropout(x, self.lora.dropout, seeds, self.site)
        thin = dense(x, self.a[...].astype(x.dtype), self.num_inputs)
        return dense(thin * self.lora.scale, self.b[...].astype(x.dtype), 1)

    def apply_dora_scale(self, y: jax.Array, kernel: jax.Array) -> jax.Array:
        """DoRA: the projection `y` [batch, ..., *outputs] by kernel and product, with the norms that are learned.

        As in the paper's section 4.3, and in PEFT, no gradient flows through the norms that are divided by.
        """
        a, b = (jax.lax.stop_gradient(factor[...]).astype(jnp.float32) for factor in (self.a, self.b))
        norms = output_norms(kernel.astype(jnp.float32) + self.lora.scale * jnp.tensordot(a, b, 1), self.num_inputs)
        return (y * (self.magnitude[...] / norms)).astype(y.dtype)


def output_norms(kernel: jax.Array, num_inputs: int) -> jax.Array:
    """The norms [*outputs] of the columns of a kernel [*inputs, *outputs]."""
    return jnp.sqrt(jnp.sum(kernel * kernel, axis=range(num_inputs)))


def dense(x: jax.Array, kernel: jax.Array, num_inputs: int) -> jax.Array:
    """The last `num_inputs` dimensions of `x` against the first of `kernel`."""
    contracted = tuple(range(x.ndim - num_inputs, x.ndim)), tuple(range(num_inputs))
    return jax.lax.dot_general(x, kernel, (contracted, ((), ())))


# ---- Kernels that are not trained in 8 or 4 bits: codes, and a float32 scale for each block of them along `embed`.
#
# The arithmetic is qwix's (github.com/google/qwix): `int8`, whose levels are evenly spaced, and `nf4`, the 4-bit
# NormalFloat of QLoRA (arXiv 2305.14314). Every projection has the axis `embed`, which tensor parallelism does not split:
# the codes of a block lie beside its scale wherever the number of blocks divides.


_BLOCK = 64  # of QLoRA's weights

# qwix is imported by whoever quantizes, and by nobody else: it is young, and may lag behind a new JAX.


def quantize_kernel(kernel: nnx.Param, kind: str) -> tuple[nnx.Param, nnx.Param]:
    """Codes with the axes of a stacked kernel, uint4 or int8, and its scales, whose axis `embed` counts blocks.

    Args:
      kind: `int8` or `nf4`.
    """
    codes, scales = _quantize(kernel[...], kernel.axes.index("embed"), kind)
    axes = tuple("embed_blocks" if axis == "embed" else axis for axis in kernel.axes)
    return nnx.Param(codes, axes=kernel.axes), nnx.Param(scales, axes=axes)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _quantize(kernel: jax.Array, axis: int, kind: str) -> tuple[jax.Array, jax.Array]:
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
def dequantize(codes: jax.Array, scales: jax.Array) -> jax.Array:
    """The float32 kernel of codes and scales, of one layer or of all."""
    import qwix

    kind = {jnp.dtype(jnp.uint4): "nf4", jnp.dtype(jnp.int8): "int8"}[codes.dtype]
    axis = next((d for d in range(codes.ndim) if codes.shape[d] != scales.shape[d]), 0)  # blocks of 1: any will do
    # Vector by vector: qwix flattens what it looks up, which gathers an array that is split, and changes no vector.
    vector = jnp.vectorize(lambda codes, scales: qwix.full_kernel(qwix.QArray(codes, scales, None, kind)),
                           signature="(n),(b)->(n)")
    return jnp.moveaxis(vector(jnp.moveaxis(codes, axis, -1), jnp.moveaxis(scales, axis, -1)), -1, axis)


def full_kernel(kernel: nnx.Variable, scale: nnx.Variable | None) -> jax.Array:
    """The kernel as it is, or dequantized where it is codes."""
    return kernel[...] if scale is None else dequantize(kernel[...], scale[...])


def dense_quantized(x: jax.Array, codes: jax.Array, scales: jax.Array, num_inputs: int, remat: bool) -> jax.Array:
    """`dense` with a kernel of one layer.

    Args:
      again: whether the backward pass makes the kernel again; else it keeps it, in the type of `x`. Where the whole
        layer is computed again, that is better left out: a split kernel is then gathered once for both.
    """

    def product(x: jax.Array, codes: jax.Array, scales: jax.Array) -> jax.Array:
        return dense(x, dequantize(codes, scales).astype(x.dtype), num_inputs)

    return (jax.checkpoint(product, prevent_cse=False) if remat else product)(x, codes, scales)
