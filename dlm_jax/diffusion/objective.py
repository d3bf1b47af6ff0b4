"""What a step minimizes: from a batch to a noisy batch and an attention mask, and the weights of the loss."""

import dataclasses
import itertools
from typing import Literal, Self

import jax
import jax.numpy as jnp

from dlm_jax.attention import AttentionMask
from dlm_jax.config_fields import check_at_least, check_choices, check_range, field
from dlm_jax.diffusion import schedule as schedules
from dlm_jax.diffusion.corruption import (
    Batch,
    NoisyBatch,
    clean_batch,
    complementary_mask,
    concat_noisy_and_clean,
    corrupt,
)
from dlm_jax.diffusion.spec import BlockSpec
from dlm_jax.errors import ConfigError
from dlm_jax.random import annealing_seed, example_keys


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """Noise, attention and weights of the loss."""

    name: Literal["diffusion", "block_diffusion", "autoregressive"] = field(
        "diffusion", "what the model learns; block_diffusion: one block after another, each by diffusion")
    shift: bool = field(True, "position n is predicted from the state at n - 1, as in the AR parent")
    schedule: Literal["linear", "cosine", "polynomial"] = field("linear", "masking probability as a function of time")
    power: float = field(2.0, "exponent of the polynomial schedule")
    loss_normalization: Literal["all_tokens", "masked_tokens", "per_example"] = field(
        "all_tokens", "divide by the tokens that may be masked (unbiased); by those that were masked (as the "
        "DiffuLLaMA reference implementation does); or each example by the length of its answer, so that all "
        "examples count the same (as LLaDA does for fine-tuning)")
    weight: Literal["elbo", "uniform"] = field("elbo", "weight of a masked token: the bound's (1/t if linear), or 1")
    min_time: float = field(1e-3, "smallest time")
    time_curriculum: tuple[tuple[int, float, float], ...] = field(
        (), "(first step, low, high) triples: times are in [low, high] from that step on; empty: [min_time, 1]")
    anneal_steps: int = field(0, "steps over which attention opens from causal; 0: bidirectional from the start")
    share_annealed_mask: bool = field(
        False, "one annealed attention pattern for all rows of a batch, as in the DiffuLLaMA reference implementation")
    block_size: int = field(32, "block_diffusion: tokens per block; 1: autoregression, a row's length: full diffusion")
    block_size_schedule: tuple[tuple[int, int], ...] = field(
        (), "block_diffusion: (first step, tokens per block) pairs that grow to block_size; empty: always block_size")
    clean_attention: Literal["causal", "block_bidirectional"] = field(
        "causal", "block_diffusion: attention among clean tokens: causal, as in the parent; or bidirectional within "
        "each block, as in BD3-LM, SDAR and Fast-dLLM v2")
    complementary: bool = field(
        False, "block_diffusion: two noisy views of each text, and each token masked in one of them")

    def __post_init__(self) -> None:
        check_choices(self, "objective")
        check_range(self.min_time, 0, 1, "objective.min_time", open_low=True, open_high=True)
        check_at_least(self.anneal_steps, 0, "objective.anneal_steps")
        check_at_least(self.block_size, 1, "objective.block_size")
        if self.name == "autoregressive" and not self.shift:
            raise ConfigError("objective.shift must be true for the autoregressive objective, which predicts the next "
                              "token")
        if self.name == "block_diffusion":
            self._check_blocks()
        elif self.block_size_schedule or self.complementary or self.clean_attention != "causal":
            raise ConfigError("objective.block_size_schedule, objective.complementary and objective.clean_attention "
                              f"need objective.name block_diffusion, got {self.name}")
        _check_starts(self.time_curriculum, "objective.time_curriculum")
        if any(len(stage) != 3 or not 0 <= stage[1] < stage[2] <= 1 for stage in self.time_curriculum):
            raise ConfigError("objective.time_curriculum must consist of (first step, low, high) with "
                              f"0 <= low < high <= 1, got {self.time_curriculum}")

    def _check_blocks(self) -> None:
        if self.anneal_steps:
            raise ConfigError("objective.anneal_steps is for the objective diffusion; for block_diffusion use "
                              "objective.block_size_schedule instead")
        _check_starts(self.block_size_schedule, "objective.block_size_schedule")
        sizes = [size for _, size in self.block_size_schedule] or [self.block_size]
        if min(sizes) < 1 or sizes[-1] != self.block_size:
            raise ConfigError(f"objective.block_size_schedule must have sizes of at least 1 and end with block_size "
                              f"{self.block_size}, got {self.block_size_schedule}")
        if self.complementary and self.schedule != "linear":
            raise ConfigError(f"objective.complementary needs objective.schedule linear, got {self.schedule}")

    @property
    def noise(self) -> schedules.NoiseSchedule:
        return schedules.NoiseSchedule(self.schedule, self.power)

    @property
    def blocks(self) -> BlockSpec | None:
        """The blocks that the trained model writes in; None: it sees the full row."""
        return BlockSpec(self.block_size, self.clean_attention) if self.name == "block_diffusion" else None

    @property
    def num_views(self) -> int:
        """Noisy copies of each text in block diffusion."""
        return 2 if self.complementary else 1

    def at_step(self, step: int) -> Self:
        """Returns the objective of one step: the same with the block size that the schedule has reached."""
        sizes = [size for start, size in self.block_size_schedule if start <= step]
        return dataclasses.replace(self, block_size=sizes[-1], block_size_schedule=()) if sizes else self

    def for_validation(self) -> Self:
        """Returns what held-out rows are scored by: the same without what only shapes training.

        Every field that is not named here, a new one too, holds for validation as well.
        """
        return dataclasses.replace(self, time_curriculum=(), anneal_steps=0, share_annealed_mask=False,
                                   block_size_schedule=(), complementary=False)

    def canonicalize(self, length: int) -> Self:
        """Returns the same objective for rows of `length` by its simplest name.

        Blocks of one token under the shift are autoregression, and one block is full diffusion.
        """
        if self.name != "block_diffusion":
            return self
        plain = dataclasses.replace(self, complementary=False, block_size_schedule=(), block_size=1,
                                    clean_attention="causal")
        if self.block_size == 1 and self.shift:
            return dataclasses.replace(plain, name="autoregressive")
        one_block = self.block_size >= length and not self.complementary
        return dataclasses.replace(plain, name="diffusion") if one_block else self

    def forward_multiplier(self, length: int) -> int:
        """Returns how often the network reads each token of a row per step: once, or for blocks per view and clean."""
        return self.num_views + 1 if self.canonicalize(length).name == "block_diffusion" else 1

    def anneal_ratio(self, step: jax.Array | int) -> jax.Array:
        """Returns the share of later positions open to attention at a step: 0 causal, 1 bidirectional; float32."""
        return schedules.anneal_ratio(step, self.anneal_steps) if self.name == "diffusion" else jnp.float32(0.0)

    def time_range(self, step: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the bounds of the times of a step, float32 scalars."""
        stages = self.time_curriculum or ((0, 0.0, 1.0),)
        stage = sum((step >= start).astype(jnp.int32) for start, _, _ in stages) - 1
        latest = 1.0 - self.min_time if self.complementary else 1.0  # the other view's time is 1 minus this view's
        low = jnp.asarray([max(low, self.min_time) for _, low, _ in stages], jnp.float32)
        return low[stage], jnp.asarray([min(high, latest) for _, _, high in stages], jnp.float32)[stage]


def noise_batch(config: ObjectiveConfig, batch: Batch, step: jax.Array, *, seed: int, batch_size: int,
                mask_token_id: int | None) -> tuple[NoisyBatch, AttentionMask]:
    """Returns the noisy batch and the attention mask for `batch`, any slice of a global batch of `batch_size` rows.

    Both are functions of (seed, step, example_index): how rows are split over devices, processes or micro-batches
    changes nothing. For block diffusion the rows of the result consist of several copies, one after another.
    """
    length = batch.tokens.shape[1]
    config = config.canonicalize(length)
    mask = attention_mask(config, batch, step, seed)
    if config.name == "autoregressive":
        return dataclasses.replace(clean_batch(batch.tokens, batch.noisable_mask), positions=batch.positions), mask
    low, high = config.time_range(step)
    times = schedules.sample_times(seed, step, batch.example_index, batch_size, low=low, high=high)
    if config.name == "block_diffusion":
        times = schedules.block_times(times, config.block_size, length, low=low, high=high)
    noisy = corrupt(batch.tokens, batch.noisable_mask, times, example_keys(seed, batch.example_index),
                    mask_token_id=mask_token_id, schedule=config.noise)
    noisy = dataclasses.replace(noisy, positions=batch.positions)
    if config.name == "diffusion":
        return noisy, mask
    views = [noisy]
    if config.complementary:
        views.append(complementary_mask(noisy, mask_token_id, config.noise.weight(1.0 - times)))
    return concat_noisy_and_clean(views, config.block_size, shift=config.shift), mask


def attention_mask(config: ObjectiveConfig, batch: Batch, step: jax.Array, seed: int) -> AttentionMask:
    """Returns the attention of a training step, under a canonical objective."""
    if config.name == "autoregressive":
        mask = AttentionMask.causal()
    elif config.name == "block_diffusion":
        mask = config.blocks.training_mask(batch.tokens.shape[1], config.num_views)
    elif config.anneal_steps == 0:
        mask = AttentionMask.bidirectional()
    else:
        mask = AttentionMask.annealed(config.anneal_ratio(step), annealing_seed(seed, step),
                                      None if config.share_annealed_mask else batch.example_index)
    return mask if batch.segment_ids is None else mask.with_segments(batch.segment_ids)


def loss_weights(config: ObjectiveConfig, batch: NoisyBatch) -> jax.Array:
    """Returns the weights [batch, length] of the cross-entropy in what is minimized: the bound's, or 1.

    Under the normalization `per_example` they are divided by the number of each row's noisable tokens (LLaDA, arXiv
    2502.09992, its guidelines for fine-tuning).
    """
    weights = batch.weights if config.weight == "elbo" else jnp.ones_like(batch.weights)
    if config.loss_normalization != "per_example":
        return weights
    return weights / jnp.maximum(batch.noisable_mask.sum(axis=1, keepdims=True), 1)


def check_mask_token(config: ObjectiveConfig, mask_token_id: int | None, vocab_size: int) -> None:
    """Raises ConfigError where diffusion has no mask token, or one outside the vocabulary."""
    if config.name == "autoregressive":
        return
    if mask_token_id is None:
        raise ConfigError("the model records no mask token; set model.mask_token to an id, a token, or a new token")
    if not 0 <= mask_token_id < vocab_size:
        raise ConfigError(f"the mask token id {mask_token_id} is outside the vocabulary of {vocab_size} tokens")


def _check_starts(stages: tuple[tuple, ...], key: str) -> None:
    starts = [stage[0] for stage in stages]
    if starts and (starts[0] != 0 or any(a >= b for a, b in itertools.pairwise(starts))):
        raise ConfigError(f"{key} must start at step 0 with increasing first steps, got {stages}")
