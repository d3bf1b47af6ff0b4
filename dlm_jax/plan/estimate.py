"""Estimates: the time of a step on any device, and its memory on GPUs, which are not compiled for.

Times are FLOPs and bytes over the peaks of the data sheets, not measurements.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn

from dlm_jax.checkpoints import resolve_lora
from dlm_jax.checkpoints.drafter import resolve_drafter
from dlm_jax.diffusion import HeadPlan, NoiseSchedule, ObjectiveConfig
from dlm_jax.diffusion.drafts import CHUNK_GUESSES
from dlm_jax.models import ModelConfig
from dlm_jax.parallel import MeshConfig, make_mesh, num_batch_shards
from dlm_jax.parallel.chips import GIB, Chip
from dlm_jax.plan.compile import Base, Memory, abstract_state, device_bytes, trace_step
from dlm_jax.plan.topology import Target
from dlm_jax.training.config import TrainConfig
from dlm_jax.training.diffusion_loss import compared_layers
from dlm_jax.training.flops import (
    count_active,
    count_params,
    drafter_flops,
    has_parent_pass,
    teacher_flops,
    train_flops,
)

# The share of their peaks that matrix products and memory reach in a training step. With 0.6, Llama-2-7B with full
# rematerialization on 256 v5e has a utilization of 43%; published are 46% (axlearn, 7B, v5e), 45.5% (MaxText,
# Llama 3.1-8B, v6e-256), 49.7 to 37.9% (MaxText, Llama-2-7B on 8 to 128 H100), 61.1% (MaxText, 16B, v5e-256).
EFFICIENCY = 0.6

_GPUS_PER_HOST = 8
_TRACED_ROWS = 1009  # a prime that no other axis of a model has, by which the batch axis is recognized

# Products of [length, head_dim] with [head_dim, length] in attention's backward pass: four; a kernel that stores no
# scores also recomputes them, once (cuDNN) or in two kernels with their gradients (tpu).
_BACKWARD_PRODUCTS = {"xla": 4, "cudnn": 5, "tpu": 7}


@dataclasses.dataclass(frozen=True)
class Flops:
    """FLOPs of a step over all chips: those of the model, and those executed, recomputation included.

    Attributes:
      target: of the model's, those of a drafter's target; 0 where there is none.
    """

    model: float
    executed: float
    target: float = 0.0


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Seconds per step, and what follows from `seconds` for the run.

    Attributes:
      limits: seconds by each limit alone: compute, memory, interconnect, network.
      floor, seconds: at least, about.
      utilization: model FLOPs utilization (MFU), a fraction of the peak.
    """

    limits: dict[str, float]
    floor: float
    seconds: float
    utilization: float
    tokens_per_second: float
    days: float
    chip_hours: float


def estimate_time(config: TrainConfig, flops: Flops, chip: Chip, num_chips: int, *, memory: float, interconnect: float,
                  network: float) -> Estimate:
    """Estimates the time of a step and of the run.

    At least the largest limit; about (compute + memory) / EFFICIENCY, or the largest limit if that is more.

    Args:
      memory: bytes read and written per chip (`memory_traffic`).
      interconnect, network: bytes that a chip sends within its slice or host, and beyond.
    """
    limits = {"compute": flops.executed / num_chips / chip.flops, "memory": memory / chip.memory_bandwidth,
              "interconnect": interconnect / chip.interconnect}
    if network:
        limits["network"] = network / (chip.network or chip.interconnect)
    floor = max(limits.values())
    seconds = max((limits["compute"] + limits["memory"]) / EFFICIENCY, floor)
    days = seconds * config.num_steps / 86400
    return Estimate(
        limits=limits, floor=floor, seconds=seconds,
        utilization=flops.model / num_chips / chip.flops / seconds,
        tokens_per_second=config.data.batch_size * config.data.length / seconds,
        days=days, chip_hours=24 * days * num_chips)


def step_flops(config: TrainConfig, architecture: ModelConfig, attention: str,
               new_mask_token: bool = False) -> Flops:
    """Counts the model's FLOPs by `train_flops`. Executed are also a second forward pass of the blocks under full
    rematerialization, of attention under any, and the recomputation in the backend's backward pass."""
    length = config.data.length
    tokens = config.data.batch_size * length
    if config.objective.name == "drafter":
        return _drafter_flops(config, architecture)
    lora, scored = resolve_lora(config.lora, architecture, new_mask_token), tokens * scored_share(config.objective)
    noised = tokens * config.objective.num_views
    tokens *= config.objective.forward_multiplier(length)
    if config.objective.clean_weight:
        scored += config.data.batch_size * length
    model = train_flops(architecture, tokens, scored, length, lora, noised)
    forward = 2 * count_active(architecture) * tokens
    product = 2 * architecture.num_layers * architecture.num_heads * architecture.head_dim * length * tokens
    block_forward = forward + 2 * product
    of_parent = teacher_flops(architecture, config.objective, config.data.batch_size * length, scored, length, lora)
    recomputed = {"none": 0.0, "dots": 2 * product, "full": block_forward, "offload": block_forward}[config.model.remat]
    return Flops(model + of_parent, model + of_parent + recomputed + (_BACKWARD_PRODUCTS[attention] - 4) * product)


def _drafter_flops(config: TrainConfig, architecture: ModelConfig) -> Flops:
    drafts, drafter = config.objective.drafts, resolve_drafter(config.drafter, architecture, 0)
    found = drafter_flops(architecture, drafter, config.data.batch_size, config.data.length, drafts.num_anchors,
                          reads_target=drafts.reads_target)
    slots = config.data.batch_size * min(drafts.num_anchors, config.data.length) * drafter.block_size
    again = 2 * count_params(drafter.layers, "blocks") * slots * (config.model.remat in ("full", "offload"))
    return Flops(sum(found), sum(found) + again, found.target)


def scored_share(objective: ObjectiveConfig) -> float:
    """Returns the mean fraction of tokens that are masked, and so scored, over the times of the last stage."""
    if objective.name == "autoregressive":
        return 1.0
    if objective.name == "self_drafting":
        return 1 - 1 / objective.block_size
    low, high = objective.time_curriculum[-1][1:] if objective.time_curriculum else (objective.min_time, 1.0)
    times = np.linspace(max(low, objective.min_time), high, 1001)
    masked = float(np.mean(NoiseSchedule(objective.schedule, objective.power).mask_probability(times)))
    if objective.complementary or objective.noise in ("all_masked", "random_tokens"):
        return 1.0
    if objective.name == "block_diffusion" and objective.shift:  # the first token of a block is always scored
        return masked + (1 - masked) / objective.block_size
    return masked


def memory_traffic(config: TrainConfig, base: Base, target: Target, state: float, temporary: float) -> float:
    """Returns a lower bound of the bytes through a device's memory per step.

    The state, and each micro-batch's temporary memory, are read once and written once; each pass of a micro-batch
    (forward, backward, and forward again to recompute) reads the weights.

    Args:
      state, temporary: GiB.
    """
    micro_batches, passes = config.optimizer.accumulate_steps, 3 if config.model.remat in ("full", "offload") else 2
    weights = count_params(base.config) * jnp.dtype(config.model.dtype).itemsize / target.mesh.shape["tensor"]
    if config.objective.name == "drafter":  # the target's weights are read forward alone, and the drafter's are few
        passes = 1
    return 2 * GIB * (state + temporary * micro_batches) + weights * passes * micro_batches


def gpu_sent(config: TrainConfig, base: Base, target: Target) -> tuple[float, float]:
    """Returns the bytes that a GPU sends per step (within its host, beyond) on a mesh that shards only the batch.

    Each micro-batch gathers the weights for the forward and the backward pass and scatters the gradients of what is
    trained over `fsdp`, in the activations' dtype; replicas of the parameters sum their float32 gradients. A group that
    is larger than a host of eight GPUs is limited by all network cards of a host together.
    """
    params, shards = count_params(base.config), target.mesh.shape["fsdp"]
    trained = sum(leaf.size for leaf in jax.tree.leaves(abstract_state(config, base, target.mesh).params))
    width, replicas = jnp.dtype(config.model.dtype).itemsize, target.mesh.size // shards
    sent = width * (2 * params + trained) * (shards - 1) / shards * config.optimizer.accumulate_steps
    sent += 2 * 4 * trained / shards * (replicas - 1) / replicas
    return (sent, 0.0) if target.mesh.size <= _GPUS_PER_HOST else (0.0, sent / _GPUS_PER_HOST)


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
    width, lora = jnp.dtype(model.dtype).itemsize, resolve_lora(config.lora, architecture, base.new_mask_token)
    if config.objective.name == "drafter":  # features and what is fused of them, forward and back
        taps = len(resolve_drafter(config.drafter, architecture, 0).target_layer_ids)
        activations += 4 * rows * config.data.length * (taps + 1) * architecture.hidden_size
    elif has_parent_pass(architecture, config.objective, config.data.length, lora):  # its states of layers and head
        taps = len(compared_layers(config.objective, architecture.num_layers))
        activations += width * rows * config.data.length * (taps + 1) * architecture.hidden_size
    gathers = target.mesh.shape["fsdp"] > 1
    layer = count_params(architecture, "blocks") / architecture.num_layers
    table = architecture.vocab_size * architecture.hidden_size
    chunks = 1 + (config.objective.teacher.distribution_weight > 0)  # the model's logits, and the parent's
    working = 8 * chunks * HeadPlan.chunk_size * architecture.vocab_size
    if config.objective.name == "drafter":  # logits of drafter and target, and their probabilities or gradients
        working = 16 * rows * CHUNK_GUESSES * architecture.vocab_size
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
    layers = config.drafter.num_layers if config.objective.name == "drafter" else base.config.num_layers
    found = []
    for scan in _scans(traced.jaxpr.jaxpr):
        if scan.params["length"] == layers:
            stacked = [out.aval for out in scan.outvars if out.aval.shape[:1] == (layers,)]  # not the scan's carry
            # The rows of experts have no batch axis of their own.
            found.append(sum(math.prod(a.shape) * a.dtype.itemsize for a in stacked
                             if any(size % _TRACED_ROWS == 0 for size in a.shape)))
    canonical = config.objective.canonicalize(config.data.length)
    second_pass = canonical.name == "diffusion" and canonical.clean_weight > 0
    kept = next(filter(None, found))  # the parent's pass, which comes first, keeps nothing
    return kept * (1 + second_pass) / _TRACED_ROWS


def _scans(jaxpr: Jaxpr) -> Iterator[JaxprEqn]:
    """Yields all scans in program order, outer ones first."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            yield equation
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from _scans(inner)
