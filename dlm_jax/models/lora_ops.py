"""LoRA on complete models: adding it, splitting off what is trained, merging it back; fingerprints of parameters."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from dlm_jax.models.config import Compute, ModelConfig
from dlm_jax.models.drafter import DraftedModel
from dlm_jax.models.lora import LoRAConfig, LoRAFactor, LoRAParam, full_kernel, output_norms, quantize_kernel
from dlm_jax.models.transformer import Transformer, abstract_model
from dlm_jax.random import counter_hash


def split_lora(model: Transformer) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """Splits a model into its graph, the base's parameters, and LoRA's factors (none without LoRA)."""
    graphdef, factors, base = nnx.split(model, LoRAFactor, ...)
    return graphdef, base, factors


def split_trainable(model: Transformer | DraftedModel) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """Splits a model into its graph, trained parameters (all without LoRA, or those of a drafter), and frozen ones."""
    if isinstance(model, DraftedModel):
        return nnx.split(model, lambda path, _: path[0] == "drafter", ...)
    if model.lora is None:
        graphdef, params = nnx.split(model)
        return graphdef, params, nnx.State({})
    return nnx.split(model, LoRAParam, ...)


def base_shapes(config: ModelConfig, compute: Compute, param_dtype: str,
                lora: LoRAConfig | None) -> tuple[nnx.GraphDef, nnx.State]:
    """Returns a model's graph and the shapes of its base, in the base's order and the dtypes `freeze_base` takes."""
    graphdef = nnx.graphdef(abstract_model(config, compute, param_dtype, lora))
    if lora is not None:
        lora = dataclasses.replace(lora, frozen_dtype=lora.read_dtype)
    return graphdef, split_lora(abstract_model(config, compute, param_dtype, lora))[1]


def freeze_base(params: Iterable[tuple[tuple, nnx.Param]],
                lora: LoRAConfig | None) -> tuple[nnx.State, tuple[str, ...]]:
    """Turns a base's parameters, which may be read one by one, into what the model stores: kernels may be quantized.

    Returns:
      the parameters, and if they were quantized the fingerprint of the originals: rounding depends on the device.
    """
    if lora is None or not lora.quantized:
        return nnx.from_flat_state(list(params)), ()
    stored, checksums = [], {}
    for path, param in params:
        checksums[path] = _checksum(param[...])
        if path[0] == "blocks" and path[-1] == "kernel":
            param, scale = quantize_kernel(param, lora.frozen_dtype)
            stored.append(((*path[:-1], "kernel_scale"), scale))
        stored.append((path, param))
    return nnx.from_flat_state(stored), (_fingerprint(checksums),)


def init_lora_factors(config: ModelConfig, lora: LoRAConfig, seed: int, param_dtype: str,
                      sharding: Sharding) -> nnx.State:
    """Returns LoRA's initial factors, from `seed` alone, without computing the rest of the model.

    Args:
      sharding: of any parameter of the model; its devices get a copy of each factor.
    """
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec())
    lora = dataclasses.replace(lora, frozen_dtype="float32")  # one program for all dtypes, without quantization
    shapes = split_lora(abstract_model(config, Compute(), param_dtype, lora))[2]
    leaves = _factor_program(config, lora, param_dtype, sharding)(seed)
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


@functools.cache
def _factor_program(config: ModelConfig, lora: LoRAConfig, param_dtype: str, sharding: Sharding) -> Callable:
    def make(seed: jax.Array) -> list[jax.Array]:
        rngs = nnx.Rngs(jax.random.key(seed))
        model = Transformer(config, rngs=rngs, param_dtype=jnp.dtype(param_dtype), lora=lora)
        return jax.tree.leaves(split_lora(model)[2])

    return jax.jit(make, out_shardings=sharding)


def add_lora(model: Transformer, lora: LoRAConfig, seed: int, param_dtype: str) -> Transformer:
    """Adds new factors to a model, which still computes the same up to the rounding of `lora.frozen_dtype`.

    Args:
      param_dtype: dtype of the trained parameters.
    """
    graphdef, shapes = base_shapes(model.config, model.compute, param_dtype, lora)
    params = ((path, shape.replace(value[...].astype(shape.dtype))) for (path, shape), (_, value) in
              zip(nnx.to_flat_state(shapes), nnx.to_flat_state(nnx.state(model)), strict=True))
    factors = init_lora_factors(model.config, lora, seed, param_dtype, model.embed.embedding[...].sharding)
    return add_dora_magnitudes(nnx.merge(graphdef, freeze_base(params, lora)[0], factors))


def add_dora_magnitudes(model: Transformer) -> Transformer:
    """Sets DoRA's magnitudes, if the model has them, to the norms of their kernels."""
    graphdef, state = nnx.split(model)
    flat = dict(nnx.to_flat_state(state))
    for path, param in flat.items():
        if path[-1] == "magnitude":
            kernel = full_kernel(flat[*path[:-2], "kernel"], flat.get((*path[:-2], "kernel_scale")))
            norms = kernel_norms(kernel, param.ndim).astype(param.dtype)
            flat[path] = param.replace(jax.device_put(norms, param[...].sharding))
    return nnx.merge(graphdef, nnx.from_flat_state(list(flat.items())))


@functools.partial(jax.jit, static_argnums=1)
def kernel_norms(kernel: jax.Array, ndim: int) -> jax.Array:
    """Returns float32 norms [layers, *outputs], of `ndim` dimensions, of a kernel [layers, *inputs, *outputs]."""
    return jax.lax.map(lambda layer: output_norms(layer.astype(jnp.float32), kernel.ndim - ndim), kernel)


def merge_lora(model: Transformer, param_dtype: str) -> Transformer:
    """Returns a model without LoRA that computes the same: each product is added to its kernel, in float32."""
    graphdef, shapes = nnx.split(abstract_model(model.config, model.compute, param_dtype))
    flat = dict(nnx.to_flat_state(nnx.state(model)))
    merged = []
    for path, shape in nnx.to_flat_state(shapes):
        value = flat[path][...]
        if path[0] == "blocks" and path[-1] == "kernel":
            value = full_kernel(flat[path], flat.get((*path[:-1], "kernel_scale")))
            a, b, magnitude = (flat.get((*path[:-1], "factors", name)) for name in ("a", "b", "magnitude"))
            if a is not None:
                value = merge_kernel(value, a[...], b[...], model.lora.scale, param_dtype,
                                     None if magnitude is None else magnitude[...])
        merged.append((path, shape.replace(value.astype(param_dtype))))
    return nnx.merge(graphdef, nnx.from_flat_state(merged))


@functools.partial(jax.jit, static_argnames=("scale", "dtype"))
def merge_kernel(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: float, dtype: str,
                 magnitude: jax.Array | None = None) -> jax.Array:
    """Returns kernel + scale x a b in `dtype`, summed in float32 one layer at a time.

    Args:
      kernel, a, b: [layers, *inputs, *outputs], [layers, *inputs, rank], [layers, rank, *outputs].
      magnitude: [layers, *outputs], DoRA's norms of the sum.
    """

    def layer(arrays: tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]) -> jax.Array:
        kernel, a, b, magnitude = jax.tree.map(lambda x: x.astype(jnp.float32), arrays)
        merged = kernel + scale * jnp.tensordot(a, b, 1, precision=jax.lax.Precision.HIGHEST)
        if magnitude is not None:
            merged *= magnitude / output_norms(merged, a.ndim - 1)
        return merged.astype(dtype)

    return jax.lax.map(layer, (kernel, a, b, magnitude))


def fingerprint(params: nnx.State) -> str:
    """Returns 16 hexadecimal digits that depend on every bit of every parameter, and not on their sharding."""
    return _fingerprint({path: _checksum(leaf[...]) for path, leaf in nnx.to_flat_state(params)})


def combine_fingerprints(*fingerprints: str) -> str:
    """Returns 16 hexadecimal digits that depend on all of them."""
    return hashlib.sha256("\n".join(fingerprints).encode()).hexdigest()[:16]


def _fingerprint(checksums: Mapping[tuple, jax.Array]) -> str:
    sums = {".".join(map(str, path)): int(checksum) for path, checksum in checksums.items()}
    return combine_fingerprints(json.dumps(sums, sort_keys=True))


@jax.jit
def _checksum(x: jax.Array) -> jax.Array:
    """Sums, modulo 2**32, a hash of each element's index and bits; the order of the sum does not matter."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint16 if x.dtype == jnp.bfloat16 else jnp.uint32)
    index = [jax.lax.broadcasted_iota(jnp.uint32, (1,) * d + x.shape[d : d + 1] + (1,) * (x.ndim - d - 1), d)
             for d in range(x.ndim)]
    return jnp.sum(counter_hash(*index, bits.astype(jnp.uint32)), dtype=jnp.uint32)
