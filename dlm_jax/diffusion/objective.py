"""What a step minimises: from a batch to a corrupted batch and an attention mask, and the weights of the loss."""

import dataclasses
from typing import Literal, Self

import jax
import jax.numpy as jnp

from dlm_jax.attention import AttentionMask
from dlm_jax.diffusion import (
    NoiseSchedule,
    NoisyBatch,
    anneal_ratio,
    annealing_seed,
    block_times,
    clean_batch,
    complementary_mask,
    concat_noisy_and_clean,
    corrupt,
    example_keys,
    sample_times,
)
from dlm_jax.diffusion.corruption import Batch
from dlm_jax.diffusion.spec import BlockSpec
from dlm_jax.errors import ConfigError


def _field(default: object, meaning: str) -> object:
    return dataclasses.field(default=default, metadata={"help": meaning})


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    name: Literal["diffusion", "block_diffusion", "autoregressive"] = _field(
        "diffusion", "what is learnt; block_diffusion: one block after another, each by diffusion")
    shift: bool = _field(True, "position n is predicted from the state at n - 1, as the AR base does")
    schedule: Literal["linear", "cosine", "polynomial"] = _field("linear", "masking probability as a function of time")
    power: float = _field(2.0, "exponent of the polynomial schedule")
    loss_normalization: Literal["all_tokens", "masked_tokens", "per_example"] = _field(
        "all_tokens", "divide by the tokens that may be masked (unbiased); by those that were (the release's); or each "
        "example by the length of its answer, so that all examples count alike (LLaDA's for fine-tuning)")
    weight: Literal["elbo", "uniform"] = _field("elbo", "weight of a masked token: the bound's (1/t if linear), or 1")
    min_time: float = _field(1e-3, "smallest time drawn")
    time_curriculum: tuple[tuple[int, float, float], ...] = _field(
        (), "(first step, low, high) triples: times are drawn from [low, high] from that step on; empty: [min_time, 1]")
    anneal_steps: int = _field(0, "steps over which attention opens from causal; 0: bidirectional from the start")
    share_annealed_mask: bool = _field(False, "one annealed attention pattern for the whole batch, as in the release")
    block_size: int = _field(32, "block_diffusion: tokens a block; 1 is autoregression, a row's length full diffusion")
    block_size_schedule: tuple[tuple[int, int], ...] = _field(
        (), "block_diffusion: (first step, tokens a block) pairs that grow to block_size; empty: block_size throughout")
    clean_attention: Literal["causal", "block_bidirectional"] = _field(
        "causal", "block_diffusion: clean text is read causally, as by the parent; or each of its blocks sees itself "
        "whole, as in BD3-LM, SDAR and Fast-dLLM v2")
    complementary: bool = _field(
        False, "block_diffusion: two noised views of each text, and each token masked in one of them")

    def __post_init__(self) -> None:
        if not 0 < self.min_time < 1:
            raise ConfigError(f"objective.min_time must lie between 0 and 1, got {self.min_time}")
        if self.name == "autoregressive" and not self.shift:
            raise ConfigError("objective.shift must be true for the autoregressive objective, which predicts the next "
                              "token")
        if self.anneal_steps < 0:
            raise ConfigError(f"objective.anneal_steps must not be negative, got {self.anneal_steps}")
        if self.name == "block_diffusion":
            self._check_blocks()
        elif self.block_size_schedule or self.complementary or self.clean_attention != "causal":
            raise ConfigError(f"objective.block_size_schedule, complementary and clean_attention belong to the objective "
                              f"block_diffusion, and this one is {self.name}")
        starts = [stage[0] for stage in self.time_curriculum]
        if starts and (starts[0] != 0 or starts != sorted(set(starts))):
            raise ConfigError(f"objective.time_curriculum must start at step 0 and go on in order, got {self.time_curriculum}")
        if any(len(stage) != 3 or not 0 <= stage[1] < stage[2] <= 1 for stage in self.time_curriculum):
            raise ConfigError(f"objective.time_curriculum are (first step, low, high) with 0 <= low < high <= 1, "
                              f"got {self.time_curriculum}")

    def _check_blocks(self) -> None:
        if self.anneal_steps:
            raise ConfigError("objective.anneal_steps opens attention for the objective diffusion; block_diffusion "
                              "grows by objective.block_size_schedule instead")
        sizes, starts = [size for _, size in self.block_size_schedule], [start for start, _ in self.block_size_schedule]
        if min([self.block_size, *sizes]) < 1:
            raise ConfigError(f"blocks have at least 1 token, got objective.block_size {self.block_size} and "
                              f"block_size_schedule {self.block_size_schedule}")
        if starts and (starts[0] != 0 or starts != sorted(set(starts)) or sizes[-1] != self.block_size):
            raise ConfigError("objective.block_size_schedule must start at step 0, go on in order and end with block_size "
                              f"{self.block_size}, got {self.block_size_schedule}")
        if self.complementary and self.schedule != "linear":
            raise ConfigError(f"objective.complementary needs the linear schedule, and this one is {self.schedule}")

    @property
    def noise(self) -> NoiseSchedule:
        return NoiseSchedule(self.schedule, self.power)

    @property
    def blocks(self) -> BlockSpec | None:
        """How a model that has learnt this writes; None: it sees whole rows."""
        return BlockSpec(self.block_size, self.clean_attention) if self.name == "block_diffusion" else None

    def at(self, step: int) -> Self:
        """What is minimised at a step: this, with the size that blocks have got to."""
        sizes = [size for start, size in self.block_size_schedule if start <= step]
        return dataclasses.replace(self, block_size=sizes[-1], block_size_schedule=()) if sizes else self

    def for_validation(self) -> Self:
        """Returns what held-out rows are scored by: the same without what only shapes training.

        Every field that is not named here, a new one too, holds for validation as well.
        """
        return dataclasses.replace(self, time_curriculum=(), anneal_steps=0, share_annealed_mask=False, block_size_schedule=(),
                                   complementary=False)

    def canonicalize(self, length: int) -> Self:
        """The same for rows of `length` by its simpler name: blocks of one token under the shift are autoregression,
        and one block is full diffusion."""
        if self.name != "block_diffusion":
            return self
        plain = dataclasses.replace(self, complementary=False, block_size_schedule=(), block_size=1, clean_attention="causal")
        if self.block_size == 1 and self.shift:
            return dataclasses.replace(plain, name="autoregressive")
        one = self.block_size >= length and not self.complementary
        return dataclasses.replace(plain, name="diffusion") if one else self


def forward_multiplier(config: ObjectiveConfig, length: int) -> int:
    """How often the network reads each token of a row in a step: once, or for blocks in every view and clean."""
    return 2 + config.complementary if config.canonicalize(length).name == "block_diffusion" else 1


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
    stages = config.time_curriculum or ((0, 0.0, 1.0),)
    stage = sum((step >= start).astype(jnp.int32) for start, _, _ in stages) - 1
    most = 1.0 - config.min_time if config.complementary else 1.0  # the time of the other view is what is left of 1
    low = jnp.asarray([max(low, config.min_time) for _, low, _ in stages], jnp.float32)
    return low[stage], jnp.asarray([min(high, most) for _, _, high in stages], jnp.float32)[stage]


def ratio_of(config: ObjectiveConfig, step: jax.Array) -> jax.Array:
    """The share of later positions open to attention at this step: 0 causal, 1 bidirectional."""
    if config.name != "diffusion":
        return jnp.float32(0.0)
    return anneal_ratio(step, config.anneal_steps)


def attention_mask(config: ObjectiveConfig, batch: Batch, step: jax.Array, seed: int) -> AttentionMask:
    """What training attends to at this step."""
    if config.name == "autoregressive":
        mask = AttentionMask.causal()
    elif config.name == "block_diffusion":
        mask = config.blocks.training_mask(batch.tokens.shape[1], views=1 + config.complementary)
    elif config.anneal_steps == 0:
        mask = AttentionMask.bidirectional()
    else:
        mask = AttentionMask.annealed(anneal_ratio(step, config.anneal_steps), annealing_seed(seed, step),
                                      None if config.share_annealed_mask else batch.example_index)
    return mask if batch.segment_ids is None else mask.with_segments(batch.segment_ids)


def prepare(config: ObjectiveConfig, batch: Batch, step: jax.Array, *, seed: int, batch_size: int,
            mask_token_id: int | None) -> tuple[NoisyBatch, AttentionMask]:
    """Noise and attention for `batch`, any part of a global batch of `batch_size` rows.

    All of it is a function of (seed, step, example_index): how rows are split over devices, processes or
    micro-batches changes nothing. Of block diffusion the result is several copies of each row, one after another.
    """
    config = config.canonicalize(batch.tokens.shape[1])
    mask = attention_mask(config, batch, step, seed)
    if config.name == "autoregressive":
        return dataclasses.replace(clean_batch(batch.tokens, batch.noisable_mask), positions=batch.positions), mask
    low, high = time_range(config, step)
    times = sample_times(seed, step, batch.example_index, batch_size, low=low, high=high)
    if config.name == "block_diffusion":
        times = block_times(times, config.block_size, batch.tokens.shape[1], low=low, high=high)
    noised = corrupt(batch.tokens, batch.noisable_mask, times, example_keys(seed, batch.example_index),
                     mask_token_id=mask_token_id, schedule=config.noise)
    noised = dataclasses.replace(noised, positions=batch.positions)
    if config.name == "diffusion":
        return noised, mask
    views = [noised]
    if config.complementary:
        views.append(complementary_mask(noised, mask_token_id, config.noise.weight(1.0 - times)))
    return concat_noisy_and_clean(views, config.block_size, shift=config.shift), mask


def loss_weights(config: ObjectiveConfig, batch: NoisyBatch) -> jax.Array:
    """Weights [batch, length] of the cross-entropy in what is minimised: the bound's, or 1; under the normalizer
    `examples` divided by the number of each row's maskable tokens (LLaDA, arXiv 2502.09992, its guidelines)."""
    weights = batch.weights if config.weight == "elbo" else jnp.ones_like(batch.weights)
    if config.loss_normalization != "per_example":
        return weights
    return weights / jnp.maximum(batch.noisable_mask.sum(axis=1, keepdims=True), 1)
