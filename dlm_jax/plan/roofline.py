"""How long a step takes at least, and about how long it will take: estimates from data sheets, not measurements."""

import dataclasses

import numpy as np

from dlm_jax.checkpoints import resolve_lora
from dlm_jax.diffusion import ObjectiveConfig
from dlm_jax.models import ModelConfig
from dlm_jax.parallel.chips import Chip
from dlm_jax.training.config import TrainConfig
from dlm_jax.training.metrics import count_params, train_flops

# The share of the chips' peaks that matrix products and memory reach in a training step. At 0.6, Llama-2-7B with full
# rematerialisation on 256 v5e comes to a utilisation of 43%; published are 46% (axlearn, 7B, v5e), 45.5% (MaxText,
# Llama 3.1-8B, v6e-256), 49.7 to 37.9% (MaxText, Llama-2-7B on 8 to 128 H100), 61.1% (MaxText, 16B, v5e-256).
EFFICIENCY = 0.6

FORMULA = f"""\
compute      FLOPs of a chip, with matrix products that are done again, / its peak
memory       (2 x state + 2 x temporary memory x micro-batches + weights x passes) / bandwidth
interconnect bytes that a chip sends within its slice or host / the bandwidth of all its links
network      bytes that it sends beyond / its share of the network
at least     the largest of these
about        (compute + memory) / {EFFICIENCY}, or what is sent if that takes longer
at worst     all of them, one after another, / {EFFICIENCY}
utilisation  FLOPs of the model, nothing counted twice, / (about x peak)"""

# Matrix products of [length, head_dim] with [head_dim, length] that attention's backward pass does: four, and in
# kernels that store no square also the scores again, once (cuDNN) or in two kernels with their gradients (tpu).
_BACKWARD_PRODUCTS = {"xla": 4, "cudnn": 5, "tpu": 7}


@dataclasses.dataclass(frozen=True)
class Flops:
    """Of a step, over all chips: what the model needs, and what is done with what is computed twice."""

    model: float
    executed: float


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes of a chip in a step.

    Attributes:
      memory: read from and written to its memory, at least.
      interconnect: sent to the chips of its slice or host.
      network: sent beyond it.
    """

    memory: float
    interconnect: float
    network: float = 0.0


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Seconds a step by FORMULA, and what follows from `seconds` for the run.

    Attributes:
      limits: seconds that each limit alone allows: compute, memory, interconnect, network.
      floor, seconds, ceiling: at least, about, at worst.
      utilisation: model FLOPs utilisation (MFU), a share of the peak.
    """

    limits: dict[str, float]
    floor: float
    seconds: float
    ceiling: float
    utilisation: float
    tokens_per_second: float
    tokens: float
    days: float
    chip_hours: float


def step_flops(config: TrainConfig, architecture: ModelConfig, attention: str,
               new_mask_token: bool = False) -> Flops:
    """The model's by `train_flops`; executed: a forward pass of the blocks again under full rematerialisation, of
    attention under any, and attention's backward pass as its backend does it."""
    length = config.data.length
    tokens = config.data.batch_size * length
    lora, scored = resolve_lora(config.lora, architecture, new_mask_token), tokens * scored_share(config.objective)
    tokens *= config.objective.forward_multiplier(length)
    model = train_flops(architecture, tokens, scored, length, lora)
    forward = 2 * count_params(architecture, "blocks") * tokens
    product = 2 * architecture.num_layers * architecture.num_heads * architecture.head_dim * length * tokens
    everything = forward + 2 * product
    again = {"none": 0.0, "dots": 2 * product, "full": everything, "offload": everything}[config.model.remat]
    return Flops(model, model + again + (_BACKWARD_PRODUCTS[attention] - 4) * product)


def scored_share(objective: ObjectiveConfig) -> float:
    """The share of tokens that are masked, and so scored, on average over the times of the last stage."""
    if objective.name == "autoregressive":
        return 1.0
    low, high = objective.time_curriculum[-1][1:] if objective.time_curriculum else (objective.min_time, 1.0)
    masked = float(np.mean(objective.noise.mask_probability(np.linspace(max(low, objective.min_time), high, 1001))))
    if objective.complementary:
        return 1.0
    if objective.name == "block_diffusion" and objective.shift:  # the first of a block is always scored
        return masked + (1 - masked) / objective.block_size
    return masked


def passes(remat: str) -> int:
    """How often a micro-batch reads all weights: forward, backward, and forward again."""
    return 3 if remat in ("full", "offload") else 2


def estimate(config: TrainConfig, flops: Flops, traffic: Traffic, chip: Chip, num_chips: int) -> Estimate:
    """Times of a step and of the run by FORMULA."""
    limits = {
        "compute": flops.executed / num_chips / chip.flops,
        "memory": traffic.memory / chip.memory_bandwidth,
        "interconnect": traffic.interconnect / chip.interconnect,
    }
    if traffic.network:
        limits["network"] = traffic.network / (chip.network or chip.interconnect)
    floor, tokens = max(limits.values()), config.data.batch_size * config.data.length
    seconds = max((limits["compute"] + limits["memory"]) / EFFICIENCY, floor)
    return Estimate(
        limits=limits, floor=floor, seconds=seconds, ceiling=sum(limits.values()) / EFFICIENCY,
        utilisation=flops.model / num_chips / chip.flops / seconds, tokens_per_second=tokens / seconds,
        tokens=tokens * config.num_steps, days=seconds * config.num_steps / 86400,
        chip_hours=seconds * config.num_steps * num_chips / 3600)
