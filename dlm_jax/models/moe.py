"""A mixture of experts in place of the MLP: a router sends each token to a few of many gated MLPs.

It is dropless: however uneven the routing, every token reaches the experts that were chosen for it. Tokens are sorted
by expert, and each run of them is multiplied by its expert's matrix (`grouped`).

Under a mesh each device has some of the experts (the axis "expert") and computes what these add for its tokens and for
those of the devices along that axis; the sums return to the devices that the tokens are on.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from dlm_jax.attention.partition import Partition, is_split
from dlm_jax.models.config import Compute, ModelConfig
from dlm_jax.models.grouped import grouped_matmul
from dlm_jax.models.layers import ACTIVATIONS, Axes, Initializer, residual_stddev
from dlm_jax.models.lora import full_kernel


class RouterSums(NamedTuple):
    """What a router did, summed over tokens; float32 [experts], or [layers, experts] of all layers.

    Attributes:
      chosen: how many tokens chose an expert.
      probability: the probabilities that it had for the tokens.
    """

    chosen: jax.Array
    probability: jax.Array


def load_balancing_loss(sums: RouterSums, experts_per_token: int) -> jax.Array:
    """Returns the mean over layers of experts x sum of (share of tokens) x (mean probability), float32.

    It is `experts_per_token` where all experts are chosen equally often, and more the less even they are (Switch
    Transformer, arXiv 2101.03961, equations 4 to 6, with several experts per token as in transformers).

    Args:
      sums: of all layers.
    """
    tokens = jnp.sum(sums.chosen, axis=-1, keepdims=True) / experts_per_token
    product = jax.lax.stop_gradient(sums.chosen / tokens) * sums.probability / tokens
    return jnp.mean(jnp.sum(product, axis=-1)) * sums.chosen.shape[-1]


class ExpertKernel(nnx.Module):
    """The matrices of all experts, [layers, experts, inputs, outputs], as they are or quantized."""

    def __init__(self, inputs: int, outputs: int, axes: Axes, config: ModelConfig, init: Initializer,
                 stddev: float | None = None):
        shape = (config.num_layers, config.experts.num_experts, inputs, outputs)
        self.kernel, self.kernel_scale = init.kernel(shape, ("layers", "expert", *axes), stddev)

    def __call__(self, dtype: jnp.dtype) -> jax.Array:
        """Returns the matrices of a layer, [experts, inputs, outputs]."""
        return full_kernel(self.kernel, self.kernel_scale).astype(dtype)


class Router(nnx.Module):
    """Scores every expert for every token."""

    def __init__(self, config: ModelConfig, init: Initializer):
        shape = (config.num_layers, config.hidden_size, config.experts.num_experts)
        self.experts = config.experts
        self.weight = init.normal(shape, ("layers", "embed", None))

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array, RouterSums]:
        """Chooses experts: `x` [batch, length, embed] to weights float32 and experts int [batch, length, k]."""
        logits = jnp.einsum("...d,de->...e", x, self.weight[...].astype(x.dtype), preferred_element_type=jnp.float32)
        probabilities = jax.nn.softmax(logits, axis=-1)
        weights, chosen = jax.lax.top_k(probabilities, self.experts.num_experts_per_tok)
        if self.experts.norm_topk_prob:
            weights /= jnp.sum(weights, axis=-1, keepdims=True)
        counts = jnp.sum(jax.nn.one_hot(chosen, logits.shape[-1], dtype=jnp.float32), axis=(0, 1, 2))
        return weights, chosen, RouterSums(counts, jnp.sum(probabilities, axis=(0, 1)))


class MoE(nnx.Module):
    """The router and the experts of all layers."""

    def __init__(self, config: ModelConfig, compute: Compute, init: Initializer):
        embed, width = config.hidden_size, config.mlp_size
        self.activation, self.partition = config.activation, compute.partition
        self.router = Router(config, init)
        self.gate = ExpertKernel(embed, width, ("embed", "mlp"), config, init)
        self.up = ExpertKernel(embed, width, ("embed", "mlp"), config, init)
        self.down = ExpertKernel(width, embed, ("mlp", "embed"), config, init, stddev=residual_stddev(config))

    def __call__(self, x: jax.Array) -> tuple[jax.Array, RouterSums]:
        """Returns the sum over each token's experts for `x` [batch, length, embed], and what the router did."""
        weights, chosen, sums = self.router(x)
        kernels = tuple(kernel(x.dtype) for kernel in (self.gate, self.up, self.down))
        if is_split(self.partition) and _divides(self.partition, x):
            return _on_shards(self.partition, self.activation, x, weights, chosen, kernels), sums
        rows = (array.reshape(-1, array.shape[-1]) for array in (x, weights, chosen))
        return apply_experts(*rows, kernels, self.activation).reshape(x.shape), sums


def _divides(partition: Partition, x: jax.Array) -> bool:
    """Returns whether the mesh splits rows [batch, length, embed] evenly; those of a sampler it may not."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return x.shape[0] % math.prod(sizes[axis] for axis in partition.batch) == 0 and (
        x.shape[1] % sizes[partition.length] == 0)


def apply_experts(x: jax.Array, weights: jax.Array, chosen: jax.Array, kernels: tuple[jax.Array, ...],
                  activation: str, first: jax.Array | int = 0) -> jax.Array:
    """Returns what some experts add for each token, [tokens, embed] in the dtype of `x`.

    Args:
      x: [tokens, embed].
      weights, chosen: of each token's k experts, [tokens, k]; those that are not among these experts add nothing.
      kernels: of gate, up and down, [experts, embed, width] twice and [experts, width, embed].
      first: the number of the first of these experts.
    """
    gate, up, down = kernels
    tokens, k = chosen.shape
    experts = len(gate)
    chosen = chosen.ravel() - first
    here = (chosen >= 0) & (chosen < experts)
    chosen = jnp.where(here, chosen, experts)  # others come last
    order = jnp.argsort(chosen, stable=True)
    sizes = jnp.bincount(chosen, length=experts + 1)[:experts]
    rows = x[order // k]
    hidden = ACTIVATIONS[activation](grouped_matmul(rows, gate, sizes)) * grouped_matmul(rows, up, sizes)
    out = grouped_matmul(hidden, down, sizes)[jnp.argsort(order)]
    out = jnp.where(here[:, None], out, 0).astype(jnp.float32) * weights.reshape(-1, 1)
    return jnp.sum(out.reshape(tokens, k, -1), axis=1).astype(x.dtype)


def _on_shards(partition: Partition, activation: str, x: jax.Array, weights: jax.Array, chosen: jax.Array,
               kernels: tuple[jax.Array, ...]) -> jax.Array:
    """Computes `apply_experts` of global arrays [batch, length, ...], each device with its tokens and its experts."""
    axis, mlp = partition.experts, partition.heads
    rows = PartitionSpec(partition.batch, partition.length, None)
    inner, outer = PartitionSpec(axis, None, mlp), PartitionSpec(axis, mlp, None)

    def local(x: jax.Array, weights: jax.Array, chosen: jax.Array, kernels: tuple[jax.Array, ...]) -> jax.Array:
        first = jax.lax.axis_index(axis) * len(kernels[0])

        def add(shard: tuple[jax.Array, ...]) -> jax.Array:
            return apply_experts(*shard, kernels, activation, first)

        tokens = tuple(array.reshape(-1, array.shape[-1]) for array in (x, weights, chosen))
        if jax.lax.axis_size(axis) == 1:
            out = add(tokens)
        else:  # one device's tokens at a time: most of them have chosen other experts, and are rows in vain
            shards = jax.lax.all_gather(tokens, axis)
            out = jax.lax.psum_scatter(jax.lax.map(jax.checkpoint(add), shards), axis, scatter_dimension=0)
        return jax.lax.psum(out, mlp).reshape(x.shape)

    return jax.shard_map(local, in_specs=(rows, rows, rows, (inner, inner, outer)), out_specs=rows,
                         check_vma=False)(x, weights, chosen, kernels)
