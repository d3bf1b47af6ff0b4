"""Floating-point operations a step must do, and what the device could do: their ratio is the utilisation (MFU)."""

import math
import time

import jax
import jax.numpy as jnp
from flax import nnx

from dlm_jax.data.config import DataConfig
from dlm_jax.models import LoraConfig, LoraFactor, ModelConfig, abstract_model
from dlm_jax.parallel.chips import find_chip


def peak_flops(device: jax.Device) -> float | None:
    """The device's dense bfloat16 peak, FLOP/s, or None where it is not known (CPUs among them)."""
    chip = find_chip(device)
    return chip and chip.flops


def count_params(config: ModelConfig, part: str | None = None) -> int:
    """Parameters of the model, or of one of its parts, such as "blocks"."""
    model = abstract_model(config)
    leaves = jax.tree.leaves(nnx.state(model if part is None else getattr(model, part)))
    return sum(math.prod(leaf.shape) for leaf in leaves)


def count_factors(config: ModelConfig, lora: LoraConfig) -> int:
    """Parameters of LoRA's factors."""
    factors = nnx.state(abstract_model(config, lora=lora), LoraFactor)
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(factors))


def train_flops(config: ModelConfig, tokens: float, scored: float, length: int,
                lora: LoraConfig | None = None) -> float:
    """FLOPs of a forward and a backward pass over `tokens` tokens in rows of `length`, `scored` of them scored.

    6 x (parameters of the blocks) x tokens, for their matrix products;
    + 12 x layers x heads x head_dim x length x tokens, for attention over the whole square (no causal half);
    + 6 x hidden x vocabulary x scored, for the head, needed only where a token is scored.
    What is computed again (remat, chunked loss) does not count. With LoRA, matrices that are not trained have 4 in
    place of 6, as they have no gradient of their own, and the factors are added.
    """
    frozen, head = (6, 6) if lora is None else (4, 6 if lora.head or (lora.embedding and config.tie_embeddings) else 4)
    blocks = frozen * count_params(config, "blocks") * tokens
    if lora is not None:
        blocks += 6 * count_factors(config, lora) * tokens
    attention = 12 * config.num_layers * config.num_heads * config.head_dim * length * tokens
    return blocks + attention + head * config.hidden_size * config.vocab_size * scored


_USUAL_SHARE = 0.3  # of the peak, or of a large matrix product's speed, that a training step reaches


def step_seconds(config: ModelConfig, data: DataConfig) -> float:
    """A rough forecast of the seconds a step takes on the devices at hand, before anything is compiled."""
    tokens = data.batch_size * data.length
    peak = peak_flops(jax.devices()[0])
    speed = peak * jax.device_count() if peak else measured_flops()
    return train_flops(config, tokens, tokens / 2, data.length) / (_USUAL_SHARE * speed)


def measured_flops(size: int = 1024, repeats: int = 4) -> float:
    """FLOP/s of a float32 matrix product of this size on the default device."""
    product, matrix = jax.jit(jnp.matmul), jnp.ones((size, size), jnp.float32)
    product(matrix, matrix).block_until_ready()
    began = time.perf_counter()
    for _ in range(repeats):
        product(matrix, matrix).block_until_ready()
    return repeats * 2 * size**3 / (time.perf_counter() - began)
