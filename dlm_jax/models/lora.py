"""LoRA (Hu et al., arXiv 2106.09685) and DoRA (Liu et al., arXiv 2402.09353) on frozen, perhaps quantized kernels.

LoRA adds a trained product of two low-rank matrices to a frozen kernel. DoRA also trains the norm of each output's
column of the sum. The type of a parameter says what is trained: with LoRA, a `LoRAParam` is and any other is not.

With `where="noised"` the factors act at noised positions alone, so that at clean positions the model is its base, bit
for bit: the base drafts for itself (Apple, arXiv 2507.11851, "gated LoRA").

A quantized kernel is codes in 8 or 4 bits and a float32 scale for each block of them along `embed`. The arithmetic is
qwix's (github.com/google/qwix): `int8`, with evenly spaced levels, and `nf4`, the 4-bit NormalFloat of QLoRA (arXiv
2305.14314). Every projection has the axis `embed`, which tensor parallelism does not split, so codes and their scale
are on the same device wherever the number of blocks divides.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dlm_jax.config_fields import check_at_least, check_choices, check_range
from dlm_jax.errors import ConfigError
from dlm_jax.matmul import MatmulKind, dense
from dlm_jax.random import dropout

if TYPE_CHECKING:
    from dlm_jax.models.config import ModelConfig
    from dlm_jax.models.layers import Initializer

QUANTIZED = ("int8", "nf4")
TARGETS = ("q", "k", "v", "out", "gate", "up", "down")  # the projections of a block
_BLOCK = 64  # weights per scale, as in QLoRA


class LoRAParam(nnx.Param):
    """A parameter that a model with LoRA trains: a factor, or a full table."""


class LoRAFactor(LoRAParam):
    """One of the two matrices added to a kernel, or DoRA's magnitudes; the base does not have it."""


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """What is trained besides a frozen model.

    Attributes:
      rank: of the products, at most each kernel's smaller side.
      alpha: products are scaled by alpha / rank, or with `rslora` by alpha / sqrt(rank) (arXiv 2312.03732).
      dropout: share of a factor's inputs that training drops.
      targets: projections that get factors, of TARGETS.
      dora: whether the norm of each output's column is trained too.
      embedding, head: whether the full table is trained; a tied head is the embedding.
      frozen_dtype: dtype of frozen matrices; one of QUANTIZED applies to blocks alone, and tables are bfloat16.
      where: the positions at which products are added: "all", or those of a noised copy alone.
      draft_head: whether a `DraftHead` is trained too.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    targets: tuple[str, ...] = TARGETS
    embedding: bool = False
    head: bool = False
    rslora: bool = False
    dora: bool = False
    frozen_dtype: Literal["float32", "bfloat16", "int8", "nf4"] = "bfloat16"
    where: Literal["all", "noised"] = "all"
    draft_head: bool = False

    def __post_init__(self) -> None:
        check_choices(self, "lora")
        check_at_least(self.rank, 1, "lora.rank")
        check_range(self.alpha, 0, math.inf, "lora.alpha", open_low=True)
        check_range(self.dropout, 0, 1, "lora.dropout", open_high=True)
        unknown = [name for name in self.targets if name not in TARGETS]
        if unknown or not self.targets:
            raise ConfigError(f"lora.targets {','.join(unknown) or '(none)'} are not projections of this model; choose "
                              f"from {', '.join(TARGETS)}")
        if self.where == "noised":
            for name in ("dora", "embedding", "head"):
                if getattr(self, name):
                    raise ConfigError(f"lora.where=noised leaves clean positions as they are, which lora.{name} would "
                                      f"change; set lora.{name} to false")
        elif self.draft_head:
            raise ConfigError("lora.draft_head is for drafts of the base's own text, with lora.where=noised; set both")

    @property
    def scale(self) -> float:
        """The factor that multiplies a product."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def quantized(self) -> bool:
        """Whether frozen kernels are stored as codes and scales."""
        return self.frozen_dtype in QUANTIZED

    @property
    def read_dtype(self) -> str:
        """The dtype of frozen matrices before kernels are quantized; the tables keep it."""
        return "bfloat16" if self.quantized else self.frozen_dtype


class LoRAInputs(NamedTuple):
    """What the factors of all projections need to know of a batch."""

    dropout_seeds: jax.Array | None = None  # uint32 [batch], of their inputs' dropout; None: no dropout
    noised: tuple[int, int] | None = None  # first and last + 1 of the positions of a noised copy; None: there is none
    enabled: bool = True  # else the model computes what its base does


class LoRAFactors(nnx.Module):
    """`a` [layers, *inputs, rank] and `b` [layers, rank, *outputs] of a kernel [layers, *inputs, *outputs].

    `a` is uniform within 1 / sqrt(number of inputs), which is Kaiming's with PEFT's slope sqrt(5), and `b` is zero, so
    that a new model computes what its base does. DoRA's `magnitude` [layers, *outputs] must first be set to the norms
    of the base's kernel.
    """

    def __init__(self, name: str, shape: tuple[int, ...], axes: tuple[str | None, ...], num_inputs: int,
                 lora: LoRAConfig, init: "Initializer"):
        layers, inputs, outputs = shape[0], shape[1 : 1 + num_inputs], shape[1 + num_inputs :]
        for side, size in (("inputs", math.prod(inputs)), ("outputs", math.prod(outputs))):
            if lora.rank > size:
                raise ConfigError(f"lora.rank {lora.rank} is larger than the {size} {side} of the projection {name!r}; "
                                  f"choose at most {size}, or remove {name!r} from lora.targets")
        self.num_inputs, self.lora, self.site = num_inputs, lora, TARGETS.index(name)
        self.matmul = init.compute.matmul
        self.a = init.factor((layers, *inputs, lora.rank), (*axes[: 1 + num_inputs], "rank"),
                             math.prod(inputs) ** -0.5)
        self.b = init.factor((layers, lora.rank, *outputs), ("layers", "rank", *axes[1 + num_inputs :]), 0.0)
        output_axes = tuple(None if axis == "embed" else axis for axis in axes[1 + num_inputs :])  # as for a bias
        self.magnitude = init.factor((layers, *outputs), ("layers", *output_axes), 0.0) if lora.dora else None

    def __call__(self, x: jax.Array, y: jax.Array, inputs: LoRAInputs) -> jax.Array:
        """Adds the product for `x` [batch, length, *inputs] to its projection `y` [batch, length, *outputs]."""
        first, last = inputs.noised or (0, 0)
        if self.lora.where == "all":
            return y + self._product(x, inputs)
        return y if first == last else y.at[:, first:last].add(self._product(x[:, first:last], inputs))

    def _product(self, x: jax.Array, inputs: LoRAInputs) -> jax.Array:
        x = dropout(x, self.lora.dropout, inputs.dropout_seeds, self.site)
        low_rank = dense(x, self.a[...].astype(x.dtype), self.num_inputs, self.matmul) * self.lora.scale
        return dense(low_rank, self.b[...].astype(x.dtype), 1, self.matmul)

    def apply_dora_scale(self, y: jax.Array, kernel: jax.Array) -> jax.Array:
        """Rescales `y` [batch, ..., *outputs], the projection by kernel and product, to DoRA's trained norms.

        No gradient flows through the norms that are divided by, as in the paper's section 4.3 and in PEFT.
        """
        a, b = (jax.lax.stop_gradient(factor[...]).astype(jnp.float32) for factor in (self.a, self.b))
        norms = output_norms(kernel.astype(jnp.float32) + self.lora.scale * jnp.tensordot(a, b, 1), self.num_inputs)
        return (y * (self.magnitude[...] / norms)).astype(y.dtype)


class DraftHead(nnx.Module):
    """Corrects a noised state by the token at its place, which is known when the next token is drafted.

    Masks draft several tokens at once, each without knowing the others. This MLP on the state and the embedding of the
    token before each draft makes them depend on each other; the model's head makes logits of the corrected state. A new
    one changes nothing.
    """

    def __init__(self, config: "ModelConfig", init: "Initializer"):
        embed, hidden = config.hidden_size, 2 * config.hidden_size
        self.matmul = init.compute.matmul
        self.from_state = init.factor((embed, hidden), ("embed", "mlp"), (2 * embed) ** -0.5)
        self.from_token = init.factor((embed, hidden), ("embed", "mlp"), (2 * embed) ** -0.5)
        self.down = init.factor((hidden, embed), ("mlp", "embed"), 0.0)

    def __call__(self, state: jax.Array, embedding: jax.Array) -> jax.Array:
        """Returns the corrected states; both arguments [..., embed]."""
        token = embedding.astype(jnp.float32)
        token *= jax.lax.rsqrt(jnp.mean(token * token, axis=-1, keepdims=True) + 1e-6)  # tables differ in scale
        dtype = state.dtype
        hidden = dense(state, self.from_state[...].astype(dtype), 1, self.matmul) + dense(
            token.astype(dtype), self.from_token[...].astype(dtype), 1, self.matmul)
        return state + dense(jax.nn.silu(hidden), self.down[...].astype(dtype), 1, self.matmul)


def project_frozen(project: Callable[..., jax.Array], x: jax.Array, arrays: tuple[jax.Array, ...],
                   noised: tuple[int, int]) -> jax.Array:
    """Computes `project(x, *arrays)` of frozen arrays, with the gradient of the positions from noised[0] to noised[1].

    With `where="noised"` no clean position depends on what is trained, so that its gradient is zero and not computed.

    Args:
      project: linear in `x` [batch, length, *inputs], position by position.
    """
    (first, last), shape, dtype = noised, x.shape, x.dtype

    @jax.custom_vjp
    def run(x: jax.Array, arrays: tuple[jax.Array, ...]) -> jax.Array:
        return project(x, *arrays)

    def backward(arrays: tuple[jax.Array, ...], g: jax.Array) -> tuple[jax.Array, None]:
        noised_part = jnp.zeros((shape[0], last - first, *shape[2:]), dtype)  # its value does not matter
        (dx,) = jax.vjp(lambda part: project(part, *arrays), noised_part)[1](g[:, first:last])
        return jnp.pad(dx, ((0, 0), (first, shape[1] - last), *[(0, 0)] * (len(shape) - 2))), None

    run.defvjp(lambda x, arrays: (run(x, arrays), arrays), backward)
    return run(x, arrays)


def output_norms(kernel: jax.Array, num_inputs: int) -> jax.Array:
    """Returns the norms [*outputs] of the columns of a kernel [*inputs, *outputs]."""
    return jnp.sqrt(jnp.sum(kernel * kernel, axis=range(num_inputs)))


def dense_quantized(x: jax.Array, codes: jax.Array, scales: jax.Array, num_inputs: int, kind: MatmulKind,
                    remat: bool) -> jax.Array:
    """Computes `dense` with the quantized kernel of one layer.

    Args:
      remat: whether the backward pass dequantizes again instead of storing the kernel in the dtype of `x`. Where the
        full layer is recomputed it should not: a split kernel is then gathered once for both.
    """

    def product(x: jax.Array, codes: jax.Array, scales: jax.Array) -> jax.Array:
        return dense(x, dequantize(codes, scales).astype(x.dtype), num_inputs, kind)

    return (jax.checkpoint(product, prevent_cse=False) if remat else product)(x, codes, scales)


def full_kernel(kernel: nnx.Variable, scale: nnx.Variable | None) -> jax.Array:
    """Returns the kernel, dequantized if it has a scale."""
    return kernel[...] if scale is None else dequantize(kernel[...], scale[...])


def quantize_kernel(kernel: nnx.Param, kind: str) -> tuple[nnx.Param, nnx.Param]:
    """Quantizes a stacked kernel to `kind`, one of QUANTIZED.

    Returns:
      codes, int8 or uint4 with the axes of the kernel, and scales, whose axis `embed_blocks` counts blocks.
    """
    codes, scales = _quantize(kernel[...], kernel.axes.index("embed"), kind)
    axes = tuple("embed_blocks" if axis == "embed" else axis for axis in kernel.axes)
    return nnx.Param(codes, axes=kernel.axes), nnx.Param(scales, axes=axes)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _quantize(kernel: jax.Array, axis: int, kind: str) -> tuple[jax.Array, jax.Array]:
    import qwix  # imported lazily: it may not support the newest JAX yet

    size = kernel.shape[axis]
    block = next(block for block in range(_BLOCK, 0, -1) if size % block == 0)

    def quantize_vector(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        quantized = qwix.quantize(x, kind, tiled_axes={0: block})
        return quantized.qvalue, quantized.scale

    def quantize_layer(kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
        vectors = jnp.moveaxis(kernel.astype(jnp.float32), axis - 1, -1)
        arrays = jnp.vectorize(quantize_vector, signature="(n)->(n),(b)")(vectors)
        return tuple(jnp.moveaxis(array, -1, axis - 1) for array in arrays)

    return jax.lax.map(quantize_layer, kernel)  # one layer at a time in float32, with qwix's temporaries


@jax.jit
def dequantize(codes: jax.Array, scales: jax.Array) -> jax.Array:
    """Returns the float32 kernel of codes and scales, of one layer or of all."""
    import qwix

    kind = {jnp.dtype(jnp.uint4): "nf4", jnp.dtype(jnp.int8): "int8"}[codes.dtype]
    axis = next((d for d in range(codes.ndim) if codes.shape[d] != scales.shape[d]), 0)  # any axis for blocks of 1
    # By vectors: qwix flattens its lookup, which would gather a split array.
    dequantize_vector = jnp.vectorize(lambda codes, scales: qwix.dequantize(qwix.QArray(codes, scales, None, kind)),
                                      signature="(n),(b)->(n)")
    return jnp.moveaxis(dequantize_vector(jnp.moveaxis(codes, axis, -1), jnp.moveaxis(scales, axis, -1)), -1, axis)
