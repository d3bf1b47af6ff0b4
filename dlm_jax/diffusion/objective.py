"""What a step minimizes: from a batch to a noisy batch and an attention mask, and the weights of the loss."""

import dataclasses

import jax
import jax.numpy as jnp

from dlm_jax.attention import AttentionMask
from dlm_jax.diffusion import schedule as schedules
from dlm_jax.diffusion.config import ObjectiveConfig
from dlm_jax.diffusion.corruption import (
    Batch,
    NoisyBatch,
    clean_batch,
    complementary_mask,
    concat_noisy_and_clean,
    corrupt,
    corrupt_late_tokens,
    replace_tokens,
)
from dlm_jax.diffusion.loss import LossWeights
from dlm_jax.diffusion.spec import BlockSpec
from dlm_jax.errors import ConfigError
from dlm_jax.random import annealing_seed, example_keys


def noise_batch(config: ObjectiveConfig, batch: Batch, step: jax.Array, *, seed: int, batch_size: int,
                mask_token_id: int | None, vocab_size: int | None = None) -> tuple[NoisyBatch, AttentionMask]:
    """Returns the noisy batch and the attention mask for `batch`, any slice of a global batch of `batch_size` rows.

    Both are functions of (seed, step, example_index): how rows are split over devices, processes or micro-batches
    changes nothing. For block diffusion the rows of the result consist of several copies, one after another.

    Args:
      mask_token_id: None for autoregression, which masks nothing.
      vocab_size: random tokens are below it; None for other noise.
    """
    length = batch.tokens.shape[1]
    config = config.canonicalize(length)
    mask = attention_mask(config, batch, step, seed)
    if config.name == "autoregressive":
        return dataclasses.replace(clean_batch(batch.tokens, batch.noisable_mask), positions=batch.positions), mask
    is_blocks, schedule = config.name == "block_diffusion", schedules.NoiseSchedule(config.schedule, config.power)
    low, high = time_range(config, step)
    times = schedules.sample_times(seed, step, batch.example_index, batch_size, low=low, high=high)
    if is_blocks:
        times = schedules.block_times(times, config.block_size, length, low=low, high=high)
    keys, noisable = example_keys(seed, batch.example_index), batch.noisable_mask
    match config.noise:
        case "rate":
            noisy = corrupt(batch.tokens, noisable, times, keys, mask_token_id=mask_token_id, schedule=schedule)
        case "position":
            times = times if is_blocks else jnp.broadcast_to(times[:, None], batch.tokens.shape)
            noisy = corrupt_late_tokens(batch.tokens, noisable, times, keys, mask_token_id=mask_token_id,
                                        block_size=config.block_size if is_blocks else length,
                                        half_life=config.half_life, schedule=schedule)
        case "all_masked":
            noisy = replace_tokens(batch.tokens, noisable, mask_token_id)
        case "random_tokens":
            noisy = replace_tokens(batch.tokens, noisable, jax.vmap(
                lambda key: jax.random.randint(key, (length,), 0, vocab_size, jnp.int32))(keys))
    noisy = dataclasses.replace(noisy, positions=batch.positions)
    if not is_blocks:
        return noisy, mask
    views = [noisy]
    if config.complementary:
        views.append(complementary_mask(noisy, mask_token_id, schedule.weight(1.0 - times)))
    return concat_noisy_and_clean(views, config.block_size, shift=config.shift), mask


def clean_causal_batch(batch: Batch) -> tuple[NoisyBatch, AttentionMask]:
    """Returns the clean rows and their causal mask: what the parent reads, and the clean copy of full diffusion.

    No position has a weight in the bound; `clean_mask` says whose AR loss may count.
    """
    clean, none = clean_batch(batch.tokens, batch.noisable_mask), jnp.zeros_like(batch.noisable_mask)
    clean = dataclasses.replace(clean, loss_mask=none, noisable_mask=none, clean_mask=batch.noisable_mask,
                                positions=batch.positions)
    mask = AttentionMask.causal()
    return clean, mask if batch.segment_ids is None else mask.with_segments(batch.segment_ids)


def block_spec(config: ObjectiveConfig) -> BlockSpec | None:
    """Returns the blocks that the trained model writes in; None: it sees the full row."""
    has_blocks = config.name in ("block_diffusion", "self_drafting")
    noise = "random_tokens" if config.noise == "random_tokens" else "mask"
    noised_attention = "causal" if config.name == "self_drafting" else "bidirectional"
    return BlockSpec(config.block_size, config.clean_attention, noise, noised_attention) if has_blocks else None


def annealing(config: ObjectiveConfig, step: jax.Array | int) -> jax.Array:
    """Returns the share of later positions open to attention at a step: 0 causal, 1 bidirectional; float32."""
    return schedules.anneal_ratio(step, config.anneal_steps) if config.name == "diffusion" else jnp.float32(0.0)


def time_range(config: ObjectiveConfig, step: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the bounds of the times of a step, float32 scalars."""
    stages = config.time_curriculum or ((0, 0.0, 1.0),)
    stage = sum((step >= start).astype(jnp.int32) for start, _, _ in stages) - 1
    latest = 1.0 - config.min_time if config.complementary else 1.0  # the other view's time is 1 minus this view's
    low = jnp.asarray([max(low, config.min_time) for _, low, _ in stages], jnp.float32)
    return low[stage], jnp.asarray([min(high, latest) for _, _, high in stages], jnp.float32)[stage]


def attention_mask(config: ObjectiveConfig, batch: Batch, step: jax.Array, seed: int) -> AttentionMask:
    """Returns the attention of a training step, under a canonical objective."""
    if config.name == "autoregressive":
        mask = AttentionMask.causal()
    elif config.name in ("block_diffusion", "self_drafting"):
        mask = block_spec(config).training_mask(batch.tokens.shape[1], config.num_views)
    elif config.anneal_steps == 0:
        mask = AttentionMask.bidirectional()
    else:
        mask = AttentionMask.annealed(annealing(config, step), annealing_seed(seed, step),
                                      None if config.share_annealed_mask else batch.example_index)
    return mask if batch.segment_ids is None else mask.with_segments(batch.segment_ids)


def loss_weights(config: ObjectiveConfig, batch: NoisyBatch) -> LossWeights:
    """Returns the weights of what is minimized, under a canonical objective.

    A noised token's is the bound's, or 1, in all terms alike. Under the normalization `per_example` all are divided by
    the number of each row's noisable tokens (LLaDA, arXiv 2502.09992, its guidelines for fine-tuning).
    """
    ones = jnp.ones_like(batch.weights)
    if config.loss_normalization == "per_example":
        count = batch.noisable_mask.sum(axis=1, keepdims=True)
        if batch.clean_mask is not None:
            count = jnp.maximum(count, batch.clean_mask.sum(axis=1, keepdims=True))
        ones /= jnp.maximum(count, 1)
    noised, teacher = ones * batch.weights if config.weight == "elbo" else ones, config.teacher
    taught = noised
    if batch.noised is not None:  # the parent teaches the noised copies, not the clean one
        taught = jnp.where(jnp.arange(noised.shape[1]) < batch.noised[1], noised, 0.0)

    def term(factor: float, weights: jax.Array) -> jax.Array | None:
        return factor * weights if factor else None

    return LossWeights(noised=config.noised_weight * noised,
                       clean=None if batch.clean_mask is None else term(config.clean_weight, ones),
                       confidence=term(config.confidence_weight, noised),
                       distribution=term(teacher.distribution_weight, taught),
                       distance=term(teacher.hidden_weight, taught))


def check_mask_token(config: ObjectiveConfig, mask_token_id: int | None, vocab_size: int) -> None:
    """Raises ConfigError where diffusion has no mask token, or one outside the vocabulary."""
    if config.name == "autoregressive":
        return
    if mask_token_id is None:
        raise ConfigError("the model records no mask token; set model.mask_token to an id, a token, or a new token")
    if not 0 <= mask_token_id < vocab_size:
        raise ConfigError(f"the mask token id {mask_token_id} is outside the vocabulary of {vocab_size} tokens")
