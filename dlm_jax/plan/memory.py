"""The memory of a step on GPUs, without compiling it: exact for the state, an estimate for the rest."""

import dataclasses
import functools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, JaxprEqn

from dlm_jax.checkpoints import resolve_lora
from dlm_jax.diffusion import HeadPlan
from dlm_jax.parallel import MeshConfig, make_mesh, num_batch_shards
from dlm_jax.parallel.chips import GIB
from dlm_jax.plan.compile import Base, Memory, abstract_state, device_bytes, trace_step
from dlm_jax.plan.topology import Target
from dlm_jax.training.config import TrainConfig
from dlm_jax.training.flops import count_params

_TRACED_ROWS = 1009  # a prime that no other axis of a model has, by which the batch axis is recognized


def estimate_memory(config: TrainConfig, base: Base, target: Target) -> Memory:
    """Estimates what a step needs per device of a mesh that shards only the batch.

    The breakdown is:
      state: parameters, optimizer moments and average, as sharded.
      gradients: float32, sharded like the parameters; with micro-batches also their sum, in the parameters' dtype.
      activations: what the backward pass of a micro-batch keeps of the forward pass.
      working: one layer's weights and the embedding tables after gathering (or one layer's weights as dequantized or
        with LoRA's products); what that layer recomputes; dense attention scores; one chunk of logits with its
        gradient; the head's gradient before it is scattered.
    """
    model, architecture, state = config.model, base.config, abstract_state(config, base, target.mesh)
    micro_batches, params = config.optimizer.accumulate_steps, device_bytes(state.params)
    gradients = 4 * params // jnp.dtype(model.param_dtype).itemsize + params * (micro_batches > 1)

    rows = config.data.batch_size / micro_batches / num_batch_shards(target.mesh)
    activations, without_remat = (rows * activation_bytes(config, base, target.attention, remat)
                                  for remat in (model.remat, "none"))
    width, gathers = jnp.dtype(model.dtype).itemsize, target.mesh.shape["fsdp"] > 1
    lora = resolve_lora(config.lora, architecture, base.new_mask_token)
    layer = count_params(architecture, "blocks") / architecture.num_layers
    table = architecture.vocab_size * architecture.hidden_size
    working = 8 * HeadPlan.chunk_size * architecture.vocab_size
    working += min(4 * table, HeadPlan.max_gradient_bytes) if gathers else 4 * table
    if gathers:
        working += width * (layer + table * (1 if architecture.tie_embeddings else 2))
    elif lora is not None and (lora.quantized or lora.dora):
        working += width * layer
    if model.remat != "none":
        working += without_remat / architecture.num_layers
    if target.attention == "xla":  # the scores and their gradient, float32
        working += 8 * rows * architecture.num_heads * config.data.length**2
    breakdown = {"state": device_bytes(state) / GIB, "gradients": gradients / GIB, "activations": activations / GIB,
                 "working": working / GIB}
    needed = sum(breakdown.values())
    return Memory(needed, target.chip.memory, needed <= target.chip.memory, breakdown)


def activation_bytes(config: TrainConfig, base: Base, attention: str, remat: str) -> float:
    """Returns the bytes per row that the layers keep for the backward pass.

    The step is traced, and the outputs that its scan over layers stacks for each row are counted (it also stacks
    parameters in the activations' dtype; these are not counted). cuDNN keeps what the TPU kernel keeps: query, key,
    value, result and logsumexp.
    """
    return _activation_bytes(dataclasses.replace(
        config, model=dataclasses.replace(config.model, remat=remat),
        data=dataclasses.replace(config.data, batch_size=_TRACED_ROWS),
        optimizer=dataclasses.replace(config.optimizer, accumulate_steps=1)), base,
        "tpu" if attention == "cudnn" else attention)


@functools.cache  # the same per row for batches of all sizes
def _activation_bytes(config: TrainConfig, base: Base, attention: str) -> float:
    traced, = trace_step(config, base, make_mesh(MeshConfig(fsdp=1), jax.devices()[:1]), attention)
    layers = base.config.num_layers
    forward = next(scan for scan in _scans(traced.jaxpr.jaxpr) if scan.params["length"] == layers)
    stacked = [out.aval for out in forward.outvars if out.aval.shape[:1] == (layers,)]  # not the scan's carry
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in stacked if _TRACED_ROWS in a.shape) / _TRACED_ROWS


def _scans(jaxpr: Jaxpr) -> Iterator[JaxprEqn]:
    """Yields all scans in program order, outer ones first."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            yield equation
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from _scans(inner)
