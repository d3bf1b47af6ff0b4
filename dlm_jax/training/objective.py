"""What a step minimises: from a batch to a corrupted batch and an attention mask, and the weights of the loss."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from dlm_jax.attention import AttentionMask
from dlm_jax.data.batch import Batch
from dlm_jax.diffusion import (
    CorruptedBatch,
    NoiseSchedule,
    anneal_ratio,
    annealing_seed,
    corrupt,
    example_keys,
    sample_times,
    uncorrupted,
)
from dlm_jax.errors import ConfigError


def _field(default: object, meaning: str) -> object:
    return dataclasses.field(default=default, metadata={"help": meaning})


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    name: Literal["diffusion", "autoregressive"] = _field("diffusion", "what is learnt")
    shift: bool = _field(True, "position n is predicted from the state at n - 1, as the AR base does")
    schedule: Literal["linear", "cosine", "polynomial"] = _field("linear", "masking probability as a function of time")
    power: float = _field(2.0, "exponent of the polynomial schedule")
    normaliser: Literal["maskable", "masked", "examples"] = _field(
        "maskable", "divide by the tokens that may be masked (unbiased); by those that were (the release's); or each "
        "example by the length of its answer, so that all examples count alike (LLaDA's for fine-tuning)")
    weight: Literal["elbo", "uniform"] = _field("elbo", "weight of a masked token: the bound's (1/t if linear), or 1")
    min_time: float = _field(1e-3, "smallest time drawn")
    stages: tuple[tuple[int, float, float], ...] = _field(
        (), "(first step, low, high) triples: times are drawn from [low, high] from that step on; empty: [min_time, 1]")
    anneal_steps: int = _field(0, "steps over which attention opens from causal; 0: bidirectional from the start")
    anneal_shared: bool = _field(False, "one annealed attention pattern for the whole batch, as in the release")

    def __post_init__(self) -> None:
        if not 0 < self.min_time < 1:
            raise ConfigError(f"objective.min_time must lie between 0 and 1, got {self.min_time}")
        if self.name == "autoregressive" and not self.shift:
            raise ConfigError("objective.shift must be true for the autoregressive objective, which predicts the next "
                              "token")
        if self.anneal_steps < 0:
            raise ConfigError(f"objective.anneal_steps must not be negative, got {self.anneal_steps}")
        starts = [stage[0] for stage in self.stages]
        if starts and (starts[0] != 0 or starts != sorted(set(starts))):
            raise ConfigError(f"objective.stages must start at step 0 and go on in order, got {self.stages}")
        if any(len(stage) != 3 or not 0 <= stage[1] < stage[2] <= 1 for stage in self.stages):
            raise ConfigError(f"objective.stages are (first step, low, high) with 0 <= low < high <= 1, "
                              f"got {self.stages}")

    @property
    def noise(self) -> NoiseSchedule:
        return NoiseSchedule(self.schedule, self.power)


def check_mask_token(config: ObjectiveConfig, mask_token_id: int | None, vocab_size: int) -> None:
    """Raises ConfigError where diffusion has no mask token, or one outside the vocabulary."""
    if config.name == "autoregressive":
        return
    if mask_token_id is None:
        raise ConfigError("the model records no mask token; set model.mask_token to an id, a token, or a new token")
    if not 0 <= mask_token_id < vocab_size:
        raise ConfigError(f"the mask token id {mask_token_id} lies outside the vocabulary of {vocab_size} tokens")


def time_range(config: ObjectiveConfig, step: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The bounds from which this step draws its times."""
    stages = config.stages or ((0, 0.0, 1.0),)
    stage = sum((step >= start).astype(jnp.int32) for start, _, _ in stages) - 1
    low = jnp.asarray([max(low, config.min_time) for _, low, _ in stages], jnp.float32)
    return low[stage], jnp.asarray([high for _, _, high in stages], jnp.float32)[stage]


def ratio_of(config: ObjectiveConfig, step: jax.Array) -> jax.Array:
    """The share of later positions open to attention at this step: 0 causal, 1 bidirectional."""
    if config.name == "autoregressive":
        return jnp.float32(0.0)
    return anneal_ratio(step, config.anneal_steps)


def attention_mask(config: ObjectiveConfig, batch: Batch, step: jax.Array, seed: int) -> AttentionMask:
    """What training attends to at this step."""
    if config.name == "autoregressive":
        mask = AttentionMask.causal()
    elif config.anneal_steps == 0:
        mask = AttentionMask.bidirectional()
    else:
        mask = AttentionMask.annealed(anneal_ratio(step, config.anneal_steps), annealing_seed(seed, step),
                                      None if config.anneal_shared else batch.example_index)
    return mask if batch.segment_ids is None else mask.with_segments(batch.segment_ids)


def prepare(config: ObjectiveConfig, batch: Batch, step: jax.Array, *, seed: int, batch_size: int,
            mask_token_id: int | None) -> tuple[CorruptedBatch, AttentionMask]:
    """Noise and attention for `batch`, any part of a global batch of `batch_size` rows.

    All of it is a function of (seed, step, example_index): how rows are split over devices, processes or
    micro-batches changes nothing.
    """
    mask = attention_mask(config, batch, step, seed)
    if config.name == "autoregressive":
        return uncorrupted(batch.tokens, batch.maskable), mask
    low, high = time_range(config, step)
    times = sample_times(seed, step, batch.example_index, batch_size, low=low, high=high)
    keys = example_keys(seed, batch.example_index)
    return corrupt(batch.tokens, batch.maskable, times, keys, mask_token_id=mask_token_id,
                   schedule=config.noise), mask


def loss_weights(config: ObjectiveConfig, batch: CorruptedBatch) -> jax.Array:
    """Weights [batch, length] of the cross-entropy in what is minimised: the bound's, or 1; under the normaliser
    `examples` divided by the number of each row's maskable tokens (LLaDA, arXiv 2502.09992, its guidelines)."""
    weights = batch.weights if config.weight == "elbo" else jnp.ones_like(batch.weights)
    if config.normaliser != "examples":
        return weights
    return weights / jnp.maximum(batch.maskable.sum(axis=1, keepdims=True), 1)
