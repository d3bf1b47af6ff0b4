"""The bytes that a step moves on a device: through its memory, to its neighbours, and beyond them."""

import jax
import jax.numpy as jnp

from dlm_jax.parallel.chips import GIB
from dlm_jax.plan.base import Base
from dlm_jax.plan.collectives import Collective
from dlm_jax.plan.memory import StepMemory
from dlm_jax.plan.program import planned_state
from dlm_jax.plan.roofline import Traffic, passes
from dlm_jax.plan.targets import Target
from dlm_jax.training.config import TrainConfig
from dlm_jax.training.metrics import count_params

_GPUS_A_HOST = 8


def memory_traffic(config: TrainConfig, base: Base, target: Target, state: float, temporary: float) -> float:
    """Bytes through a device's memory, at least: state and, each micro-batch, temporary memory once in and once out;
    each pass of a micro-batch reads the weights.

    Args:
      state, temporary: GiB.
    """
    micro_batches = config.optimizer.accumulate_steps
    weights = count_params(base.config) * jnp.dtype(config.model.dtype).itemsize / target.mesh.shape["tensor"]
    return 2 * GIB * (state + temporary * micro_batches) + weights * passes(config.model.remat) * micro_batches


def compiled_traffic(found: list[Collective], memory: float) -> Traffic:
    """Of a compiled program: what its collectives send."""
    return Traffic(memory, sum(c.sent for c in found if not c.between_slices),
                   sum(c.sent for c in found if c.between_slices))


def described_traffic(config: TrainConfig, base: Base, target: Target, memory: StepMemory) -> Traffic:
    """Of GPUs with a mesh that splits only the batch.

    Each micro-batch gathers the weights for the forward and for the backward pass and scatters the gradients, all in
    the type of the activations, over `fsdp`; copies of the parameters sum their float32 gradients. What is not trained
    has none. Where a group is larger than a host of eight, it moves at the pace of the network cards of a host, all at
    work.
    """
    sizes, params = target.mesh.shape, count_params(base.config)
    trained = sum(leaf.size for leaf in jax.tree.leaves(planned_state(config, base, target.mesh).params))
    width, shards = jnp.dtype(config.model.dtype).itemsize, sizes["fsdp"]
    forward_multiplier = target.mesh.size // shards
    sharded = width * (2 * params + trained) * (shards - 1) / shards * config.optimizer.accumulate_steps
    copied = 2 * 4 * trained / shards * (forward_multiplier - 1) / forward_multiplier
    traffic = memory_traffic(config, base, target, memory.state, memory.total - memory.state)
    if target.mesh.size <= _GPUS_A_HOST:
        return Traffic(traffic, sharded + copied)
    return Traffic(traffic, 0.0, (sharded + copied) / _GPUS_A_HOST)
