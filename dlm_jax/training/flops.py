"""How much a step computes, and how fast the devices are: FLOPs, their peak, and memory."""

import functools
import math
from typing import NamedTuple

import jax
from flax import nnx

from dlm_jax.diffusion import ObjectiveConfig
from dlm_jax.models import DrafterConfig, LoRAConfig, LoRAFactor, ModelConfig, abstract_model
from dlm_jax.parallel.chips import GIB, find_chip


def peak_flops(device: jax.Device) -> float | None:
    """Returns the device's dense bfloat16 peak, FLOP/s; None where it is unknown, as for CPUs."""
    chip = find_chip(device)
    return chip and chip.flops


@functools.cache
def count_params(config: ModelConfig, submodule: str | None = None) -> int:
    """Returns the number of parameters of the model, or of a submodule such as "blocks"."""
    model = abstract_model(config)
    return _count(nnx.state(model if submodule is None else getattr(model, submodule)))


@functools.cache
def count_lora(config: ModelConfig, lora: LoRAConfig) -> int:
    """Returns the number of parameters of LoRA's factors."""
    return _count(nnx.state(abstract_model(config, lora=lora), LoRAFactor))


def count_active(config: ModelConfig) -> int:
    """Returns the number of the blocks' parameters that a token uses: of a mixture, those of its experts."""
    blocks, experts = count_params(config, "blocks"), config.experts
    if experts is None:
        return blocks
    all_experts = 3 * config.num_layers * experts.num_experts * config.hidden_size * config.mlp_size
    return blocks - all_experts + all_experts * experts.num_experts_per_tok // experts.num_experts


def _count(state: nnx.State) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state))


def train_flops(config: ModelConfig, tokens: float, scored: float, length: int, lora: LoRAConfig | None = None,
                noised: float = 0.0) -> float:
    """Returns the FLOPs of a forward and a backward pass over `tokens` tokens in rows of `length`.

    6 x (parameters of the blocks that a token uses) x tokens, for their matrix products;
    + 12 x layers x heads x head_dim x length x tokens, for attention over the full square (no causal half);
    + 6 x hidden x vocabulary x `scored`, for the head, needed only where a token is scored.
    Recomputation (remat, chunked loss) does not count. With LoRA, frozen matrices count 4 instead of 6, as they have no
    gradient of their own, and the factors are added; at noised positions alone, clean ones have no backward pass.

    Args:
      noised: how many of the tokens are of noised copies.
    """
    learning = noised if lora is not None and lora.where == "noised" else tokens
    blocks, head = count_active(config) * (2 * tokens + (4 if lora is None else 2) * learning), 6
    if lora is not None:
        blocks += 6 * count_lora(config, lora) * learning
        head = 6 if lora.head or (lora.embedding and config.tie_embeddings) else 4
    attention = 12 * config.num_layers * config.num_heads * config.head_dim * length * tokens
    return blocks + attention + head * config.hidden_size * config.vocab_size * scored


def has_parent_pass(config: ModelConfig, objective: ObjectiveConfig, length: int, lora: LoRAConfig | None) -> bool:
    """Returns whether the parent reads the text in a pass of its own.

    With LoRA at noised positions the clean copy of block diffusion computes what the parent does, bit for bit, unless
    the base has dropout.
    """
    is_gated = lora is not None and lora.where == "noised" and (
        objective.canonicalize(length).name == "block_diffusion")
    drops = max(config.embed_dropout, config.attention_dropout, config.residual_dropout) > 0
    return objective.teacher.is_needed and (drops or not is_gated)


def teacher_flops(config: ModelConfig, objective: ObjectiveConfig, tokens: float, scored: float, length: int,
                  lora: LoRAConfig | None) -> float:
    """Returns the FLOPs of the parent in a step: a forward pass over the clean text, and its head where it teaches.

    Args:
      tokens: of the text, one copy.
      scored: positions where the head runs.
    """
    if not objective.teacher.is_needed:
        return 0.0
    blocks = 0.0
    if has_parent_pass(config, objective, length, lora):
        blocks = 2 * count_params(config, "blocks") * tokens
        blocks += 4 * config.num_layers * config.num_heads * config.head_dim * length * tokens
    head = 2 * config.hidden_size * config.vocab_size * scored if objective.teacher.distribution_weight else 0.0
    return blocks + head


class DrafterFlops(NamedTuple):
    """FLOPs of a step that trains a drafter: of the target's forward pass, and of the drafter's passes."""

    target: float
    drafter: float


def drafter_flops(target: ModelConfig, drafter: DrafterConfig, rows: float, length: int, num_anchors: int, *,
                  reads_target: bool) -> DrafterFlops:
    """Returns the FLOPs of rows of `length` with `num_anchors` blocks each, counted as in `train_flops`.

    The target's head runs where the drafter guesses, if a loss reads the target's distribution. The drafter's guesses
    go through the same head, forward and back; keys and values of the text are computed by each of its layers.

    Args:
      num_anchors: at most `length`; rows that are shorter have fewer.
    """
    layers, tokens, anchors = drafter.layers, rows * length, rows * min(num_anchors, length)
    head = target.hidden_size * target.vocab_size * anchors * drafter.num_drafts
    attention = 4 * target.num_layers * target.num_heads * target.head_dim * length * tokens
    of_target = 2 * count_active(target) * tokens + attention + 2 * head * reads_target
    slots, width = anchors * drafter.block_size, target.hidden_size
    text = len(drafter.target_layer_ids) * width**2 + 2 * layers.num_layers * width * (
        layers.num_kv_heads * layers.head_dim)
    own = 6 * text * tokens + 6 * count_params(layers, "blocks") * slots + 4 * head
    own += 12 * layers.num_layers * layers.num_heads * layers.head_dim * (length + drafter.block_size) * slots
    own += 6 * drafter.markov_rank * target.vocab_size * anchors * drafter.num_drafts
    return DrafterFlops(of_target, own)


def peak_memory_gib() -> float | None:
    """Returns the peak memory of any device of this process so far, in GiB; None where no device reports it (CPUs)."""
    peaks = [stats["peak_bytes_in_use"] for device in jax.local_devices()
             if (stats := device.memory_stats()) and "peak_bytes_in_use" in stats]
    return max(peaks) / GIB if peaks else None
