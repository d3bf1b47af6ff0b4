"""The layers of a decoder block: rotary embedding, key/value cache, norms, projections, attention and MLP.

Every parameter of a block has a leading `layers` dimension: a block object holds the parameters of all layers, and
`transformer.py` scans over them, calling a block whose parameters have lost that dimension. Parameters name their
logical axes in `.axes`, one per dimension; `parallel.sharding` maps them to a mesh.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dlm_jax.attention import AttentionMask, attend, soft_cap, xla_attention
from dlm_jax.errors import ConfigError
from dlm_jax.matmul import DEFAULT, MatmulKind, add_bias, dense, matmul
from dlm_jax.models.config import Compute, ModelConfig, RopeScaling
from dlm_jax.models.layer_types import MaskChoice, attend_under
from dlm_jax.models.lora import (
    LoRAConfig,
    LoRAFactor,
    LoRAFactors,
    LoRAInputs,
    LoRAParam,
    dense_quantized,
    full_kernel,
    project_frozen,
    quantize_kernel,
)

Axes = tuple[str | None, ...]

ACTIVATIONS = {
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
}

_SHORTEST_READ = 64  # positions of a cache

_REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims,
    "full": None,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[], names_which_can_be_offloaded=["layer input"], offload_src="device",
        offload_dst="pinned_host"),
}


def frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """Returns rotary frequencies float32 [head_dim / 2], in radians per position (Su et al., arXiv 2104.09864)."""
    freqs = 1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim))
    if scaling is None or scaling.kind == "dynamic":
        return freqs.astype(np.float32)
    if scaling.kind == "linear":
        return (freqs / scaling.factor).astype(np.float32)
    # What follows: `kept` is 0 for frequencies that are fully stretched and 1 for those that are not stretched.
    if scaling.kind == "yarn":
        kept = 1 - _yarn_ramp(head_dim, theta, scaling)
    else:
        turns = scaling.original_max_length * freqs / (2 * np.pi)
        kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        kept = np.clip(kept, 0.0, 1.0)
    return (freqs * (kept + (1 - kept) / scaling.factor)).astype(np.float32)


def _yarn_ramp(head_dim: int, theta: float, scaling: RopeScaling) -> np.ndarray:
    """Returns how far each frequency is stretched, 0 to 1, [head_dim / 2]: a ramp over channels (arXiv 2309.00071)."""
    def channel(turns: float) -> float:
        """Returns the channel that turns this often in the original length."""
        return head_dim * math.log(scaling.original_max_length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = channel(scaling.beta_fast), channel(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    return np.clip((np.arange(head_dim // 2, dtype=np.float32) - first) / (last - first or 0.001), 0, 1)


def rotary(config: ModelConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns cosine and sine for `rotate`, as `rotation` does, of an architecture's positions int [(batch,) length].

    Raises:
      ConfigError: rows that `dynamic` scaling would stretch.
    """
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind == "dynamic" and positions.shape[-1] > config.max_length:
        raise ConfigError(f"the sequence has {positions.shape[-1]} tokens, and dynamic RoPE scaling is implemented for "
                          f"the model's {config.max_length} positions alone; use shorter rows")
    angles = rotation(positions, frequencies(int(config.head_dim * config.partial_rotary_factor), config.rope_theta,
                                             scaling))
    factor = 1.0 if scaling is None else scaling.attention_factor
    return angles if factor == 1 else (angles[0] * factor, angles[1] * factor)


def rotation(positions: jax.Array, freqs: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Returns cosine and sine, float32 [batch or 1, length, 1, freqs], of positions int [(batch,) length]."""
    angles = jnp.atleast_2d(positions).astype(jnp.float32)[..., None, None] * freqs
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos_sin: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates `x` [batch, length, heads, head_dim], halves paired as in HF, in float32; returns the dtype of `x`.

    Channels after twice the number of frequencies stay as they are.
    """
    cos, sin = cos_sin
    rotated = 2 * cos.shape[-1]
    a, b = jnp.split(x[..., :rotated].astype(jnp.float32), 2, axis=-1)
    y = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
    return y if rotated == x.shape[-1] else jnp.concatenate([y, x[..., rotated:]], axis=-1)


class Cache(NamedTuple):
    """Keys and values of every layer, [layers, batch, length, kv_heads, head_dim]."""

    key: jax.Array
    value: jax.Array

    @classmethod
    def empty(cls, config: ModelConfig, batch: int, length: int, dtype: str) -> Self:
        """Returns a cache of zeros; attention to it must mask positions that have not been written."""
        shape = (config.num_layers, batch, length, config.num_kv_heads, config.head_dim)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    def write(self, layer: jax.Array, positions: jax.Array, key: jax.Array, value: jax.Array,
              rows: jax.Array | None = None) -> Self:
        """Writes keys and values [batch, Q, kv_heads, head_dim] at `positions` [batch, Q]; past the end: dropped.

        `rows`, int [batch], are the cache's rows that they belong to; None: the first, the second and so on.
        """
        rows = jnp.arange(key.shape[0]) if rows is None else rows
        return Cache(*(cached.at[layer, rows[:, None], positions].set(new.astype(cached.dtype), mode="drop")
                       for cached, new in zip(self, (key, value), strict=True)))

    def read(self, layer: jax.Array, width: int, rows: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """Returns the first keys and values of one layer, [batch, width, kv_heads, head_dim]; `rows` as in `write`."""
        found = (jax.lax.dynamic_index_in_dim(x[:, :, :width], layer, keepdims=False) for x in self)
        return tuple(x if rows is None else x[rows] for x in found)

    @property
    def read_widths(self) -> list[int]:
        """How much of it attention may read: of a long cache that is not full, most would be read in vain."""
        length = self.key.shape[2]
        parts = {max(length * eighths // 8, _SHORTEST_READ) for eighths in (1, 2, 4, 6)}
        return [*sorted(part for part in parts if part < length), length]


class LayerCache(NamedTuple):
    """A cache as one layer uses it."""

    cache: Cache
    layer: jax.Array  # the layer's index
    positions: jax.Array  # int [batch, Q], the places of its queries
    read_index: jax.Array  # which of `Cache.read_widths` holds all that they see
    rows: jax.Array | None = None  # int [batch], the cache's row of each query row; see `Cache.write`


class Initializer:
    """Creates parameters of one dtype, random ones from one stream.

    With LoRA, frozen matrices have the dtype `lora.read_dtype`; norms and biases, which are small, do not.
    """

    def __init__(self, config: ModelConfig, compute: Compute, rngs: nnx.Rngs, dtype: jnp.dtype,
                 lora: LoRAConfig | None = None):
        self.stddev, self.compute, self.rngs = config.initializer_range, compute, rngs
        self.dtype, self.lora = dtype, lora

    def normal(self, shape: tuple[int, ...], axes: Axes, stddev: float | None = None, *,
               trained: bool = False) -> nnx.Param:
        """Returns a matrix; `trained`: it is trained although the model has LoRA."""
        value = jax.random.normal(self.rngs.params(), shape, self.dtype)
        value *= self.stddev if stddev is None else stddev
        if self.lora is None:
            return nnx.Param(value, axes=axes)
        return LoRAParam(value, axes=axes) if trained else nnx.Param(value.astype(self.lora.read_dtype), axes=axes)

    def kernel(self, shape: tuple[int, ...], axes: Axes, stddev: float | None) -> tuple[nnx.Param, nnx.Param | None]:
        """Returns a stacked kernel, and its scales if LoRA quantizes it."""
        kernel = self.normal(shape, axes, stddev)
        quantize = self.lora is not None and self.lora.quantized
        return quantize_kernel(kernel, self.lora.frozen_dtype) if quantize else (kernel, None)

    def factor(self, shape: tuple[int, ...], axes: Axes, bound: float) -> LoRAFactor:
        """Returns a LoRA matrix, uniform between -bound and bound."""
        value = jax.random.uniform(self.rngs.params(), shape, self.dtype, -bound, bound)
        return LoRAFactor(value, axes=axes)

    def full(self, shape: tuple[int, ...], axes: Axes, value: float) -> nnx.Param:
        return nnx.Param(jnp.full(shape, value, self.dtype), axes=axes)


class Norm(nnx.Module):
    """LayerNorm or RMSNorm over the last dimension, in float32; see `ModelConfig.norm`."""

    def __init__(self, config: ModelConfig, shape: tuple[int, ...], init: Initializer, kind: str | None = None):
        axes = ("layers",) * (len(shape) - 1) + (None,)
        self.kind, self.eps = kind or config.norm, config.norm_eps
        self.scale = init.full(shape, axes, 0.0 if self.kind == "zero_centered_rms" else 1.0)
        self.bias = init.full(shape, axes, 0.0) if self.kind == "layer" else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        if self.kind == "layer":
            y -= jnp.mean(y, axis=-1, keepdims=True)
        y *= jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        scale = self.scale[...].astype(jnp.float32)
        y *= 1 + scale if self.kind == "zero_centered_rms" else scale
        if self.bias is not None:
            y += self.bias[...].astype(jnp.float32)
        return y.astype(x.dtype)


class Linear(nnx.Module):
    """Contracts the last `num_inputs` dimensions of the input with a kernel [layers, *inputs, *outputs].

    Where LoRA targets the projection by its `name`, the kernel has factors. A quantized kernel consists of codes, and
    has scales.
    """

    def __init__(self, name: str, inputs: tuple[int, ...], outputs: tuple[int, ...], axes: Axes, num_layers: int,
                 bias: bool, init: Initializer, stddev: float | None = None):
        self.num_inputs, self.compute = len(inputs), init.compute
        shape, lora = (num_layers, *inputs, *outputs), init.lora
        self.learns_at_noised = lora is not None and lora.where == "noised"
        self.kernel, self.kernel_scale = init.kernel(shape, ("layers", *axes), stddev)
        targeted = lora is not None and name in lora.targets
        self.factors = LoRAFactors(name, shape, ("layers", *axes), self.num_inputs, lora, init) if targeted else None
        # A bias along the residual stream is replicated: it is added where the stream is.
        bias_axes = tuple(None if axis == "embed" else axis for axis in axes[len(inputs):])
        self.bias = init.full((num_layers, *outputs), ("layers", *bias_axes), 0.0) if bias else None

    def __call__(self, x: jax.Array, lora: LoRAInputs = LoRAInputs()) -> jax.Array:
        """Projects `x` [batch, length, *inputs] to [batch, length, *outputs]."""
        if self.kernel_scale is None:
            project = functools.partial(dense, num_inputs=self.num_inputs, kind=self.compute.matmul)
            arrays = (self.kernel[...].astype(x.dtype),)
        else:
            project = functools.partial(dense_quantized, num_inputs=self.num_inputs, kind=self.compute.matmul,
                                        remat=self.compute.remat == "none")
            arrays = self.kernel[...], self.kernel_scale[...]
        if self.learns_at_noised and lora.noised:
            y = project_frozen(project, x, arrays, lora.noised)
        else:
            y = project(x, *arrays)
        if self.factors is not None and lora.enabled:
            y = self.factors(x, y, lora)
            if self.factors.magnitude is not None:
                y = self.factors.apply_dora_scale(y, full_kernel(self.kernel, self.kernel_scale))
        return y if self.bias is None else add_bias(y, self.bias[...].astype(x.dtype), self.compute.matmul)


class Attention(nnx.Module):
    """Self-attention with grouped queries, optional rotary positions and query/key norms."""

    def __init__(self, config: ModelConfig, compute: Compute, init: Initializer):
        d, n = (config.hidden_size,), config.num_layers
        heads, kv_heads = (config.num_heads, config.head_dim), (config.num_kv_heads, config.head_dim)
        self.compute, self.dropout_rate, self.softcap = compute, config.attention_dropout, config.attention_softcap
        # Attention divides scores by the root of `head_dim`.
        self.query_scale = (config.head_dim / (config.query_pre_attn_scalar or config.head_dim)) ** 0.5
        self.q = Linear("q", d, heads, ("embed", "heads", "head_dim"), n, config.qkv_bias, init)
        self.k = Linear("k", d, kv_heads, ("embed", "kv_heads", "head_dim"), n, config.qkv_bias, init)
        self.v = Linear("v", d, kv_heads, ("embed", "kv_heads", "head_dim"), n, config.qkv_bias, init)
        self.out = Linear("out", heads, d, ("heads", "head_dim", "embed"), n, config.out_bias, init,
                          stddev=residual_stddev(config))
        norm = "rms" if config.norm == "layer" else config.norm
        self.q_norm = Norm(config, (n, config.head_dim), init, norm) if config.qk_norm else None
        self.k_norm = Norm(config, (n, config.head_dim), init, norm) if config.qk_norm else None

    def __call__(self, x: jax.Array, mask: AttentionMask | MaskChoice, cos_sin: tuple[jax.Array, jax.Array] | None,
                 dropout_seeds: jax.Array | None, lora: LoRAInputs,
                 layer_cache: LayerCache | None) -> tuple[jax.Array, Cache | None]:
        query, (key, value) = self.queries(x, cos_sin, lora), self.keys_and_values(x, cos_sin, lora)
        if layer_cache is not None:
            cache = layer_cache.cache.write(layer_cache.layer, layer_cache.positions, key, value, layer_cache.rows)
            layer_cache = layer_cache._replace(cache=cache)
            attended = attend_under(mask, lambda mask: attend_to_cache(query, layer_cache, mask, self.compute.matmul,
                                                                       self.softcap))
            return self.out(attended, lora), cache
        attended = attend_under(mask, lambda mask: attend(
            query, key, value, mask, backend=self.compute.attention, partition=self.compute.partition,
            matmul_kind=self.compute.matmul, dropout_rate=self.dropout_rate, dropout_seeds=dropout_seeds,
            softcap=self.softcap))
        return self.out(attended, lora), None

    def queries(self, x: jax.Array, cos_sin: tuple[jax.Array, jax.Array] | None,
                lora: LoRAInputs = LoRAInputs()) -> jax.Array:
        """Returns [batch, length, heads, head_dim] of `x` [batch, length, embed]."""
        query = self.q(x, lora)
        query = query if self.q_norm is None else self.q_norm(query)
        query = query if self.query_scale == 1 else query * self.query_scale
        return query if cos_sin is None else rotate(query, cos_sin)

    def keys_and_values(self, x: jax.Array, cos_sin: tuple[jax.Array, jax.Array] | None,
                        lora: LoRAInputs = LoRAInputs()) -> tuple[jax.Array, jax.Array]:
        """Returns keys and values [batch, length, kv_heads, head_dim] of `x` [batch, length, embed]."""
        key, value = self.k(x, lora), self.v(x, lora)
        key = key if self.k_norm is None else self.k_norm(key)
        return key if cos_sin is None else rotate(key, cos_sin), value


def attend_to_cache(query: jax.Array, layer_cache: LayerCache, mask: AttentionMask, matmul_kind: MatmulKind,
                    softcap: float | None = None) -> jax.Array:
    """Returns the attention of `query` [batch, Q, heads, head_dim] to as much of the cache as it sees."""
    cache, layer, positions, read_index, rows = layer_cache

    def attend_to(width: int) -> jax.Array:
        return xla_attention(query, *cache.read(layer, width, rows), mask, query_positions=positions, softcap=softcap,
                             matmul_kind=matmul_kind)

    widths = cache.read_widths
    if len(widths) == 1:
        return attend_to(widths[0])
    return jax.lax.switch(read_index, [functools.partial(attend_to, width) for width in widths])


class MLP(nnx.Module):
    """Two-layer MLP, gated or not."""

    def __init__(self, config: ModelConfig, compute: Compute, init: Initializer):
        d, f, n = (config.hidden_size,), (config.mlp_size,), config.num_layers
        self.activation, self.compute = config.activation, compute
        self.gate = Linear("gate", d, f, ("embed", "mlp"), n, config.mlp_bias, init) if config.gated_mlp else None
        self.up = Linear("up", d, f, ("embed", "mlp"), n, config.mlp_bias, init)
        self.down = Linear("down", f, d, ("mlp", "embed"), n, config.mlp_bias, init, stddev=residual_stddev(config))

    def __call__(self, x: jax.Array, lora: LoRAInputs = LoRAInputs()) -> jax.Array:
        def activation(x: jax.Array) -> jax.Array:
            if self.compute.matmul == "default":
                return ACTIVATIONS[self.activation](x)
            # A CPU rounds every intermediate bfloat16 value, which costs more than the activation does.
            return ACTIVATIONS[self.activation](x.astype(jnp.float32)).astype(x.dtype)

        def down(gate: jax.Array | None, up: jax.Array, down: Linear) -> jax.Array:
            return down(activation(up) if gate is None else activation(gate) * up, lora)

        gate, up = None if self.gate is None else self.gate(x, lora), self.up(x, lora)
        if self.compute.remat == "none":  # only the inputs of the activation are saved: recomputing it is cheaper
            down = jax.checkpoint(down, prevent_cse=False)
        return down(gate, up, self.down)


class LMHead(NamedTuple):
    """What makes logits of hidden states.

    Attributes:
      kernel: [vocab, embed] if `tied`, as an embedding is, else [embed, vocab].
      softcap: bound of the logits, see `soft_cap`; None: there is none.
    """

    kernel: jax.Array
    tied: bool
    matmul: MatmulKind
    softcap: float | None = None

    @property
    def vocab_size(self) -> int:
        return self.kernel.shape[0 if self.tied else 1]

    def __call__(self, hidden: jax.Array) -> jax.Array:
        """Returns float32 logits [..., vocab] of hidden states [..., embed]."""
        rows = hidden.reshape(-1, hidden.shape[-1])
        logits = matmul(rows, self.kernel.astype(hidden.dtype), self.matmul, transpose_b=self.tied)
        return soft_cap(logits, self.softcap).reshape(*hidden.shape[:-1], logits.shape[-1])

    def first(self, vocab_size: int | None) -> Self:
        """Returns the head of the first tokens of the vocabulary; None: of all."""
        if vocab_size is None:
            return self
        kernel = self.kernel[:vocab_size] if self.tied else self.kernel[:, :vocab_size]
        return self._replace(kernel=kernel)


def split_layers(blocks: nnx.Module, compute: Compute) -> tuple[nnx.GraphDef, nnx.State]:
    """Splits stacked layers into what a scan merges again and the parameters that it runs over."""
    graphdef, stacked = nnx.split(blocks)
    if compute.matmul != DEFAULT:  # else the backward pass would store each layer's converted kernels
        dtype = jnp.dtype(compute.dtype)
        stacked = nnx.map_state(
            lambda path, param: param.replace(param[...].astype(dtype))
            if path[-1] == "kernel" and jnp.issubdtype(param.dtype, jnp.floating) else param, stacked)
    return graphdef, stacked


def rematerialize(layer: Callable, kind: str) -> Callable:
    """Returns the body of a scan over layers, which the backward pass recomputes as `Compute.remat` says."""
    return layer if kind == "none" else jax.checkpoint(layer, policy=_REMAT_POLICIES[kind], prevent_cse=False)


def residual_stddev(config: ModelConfig) -> float:
    """Returns the initial scale of projections onto the residual stream, in GPT-2 less the more of them there are."""
    scale = (2 * config.num_layers) ** -0.5 if config.family == "gpt2" else 1.0
    return config.initializer_range * scale
