"""The mathematics of absorbing (masked) diffusion: pure functions of arrays.

How a token becomes a loss:

    Batch ── sample_times ── corrupt ─────────▶ NoisyBatch ──▶ model ──▶ hidden states ── loss_sums ──▶ LossSums
    tokens,    schedule      corruption         tokens with      ▲       [batch, length,     loss       nats, summed
    noisable                                    masks, targets,  │        embed]
    mask                                        loss mask,       │
      │                                         weights          │
      └── attention_mask ── objective ──▶ AttentionMask ─────────┘

`objective.noise_batch` runs the left half and returns (NoisyBatch, AttentionMask); `ObjectiveConfig` chooses the noise,
the attention and the weights. Block diffusion concatenates noisy and clean copies (`concat_noisy_and_clean`). The
autoregressive objective is the same path without corruption, under a causal mask. `fused_loss` applies the output head
only where the loss mask is set, in chunks. `spec` holds what a model needs at inference: `DiffusionSpec`, `BlockSpec`.
"""

from dlm_jax.diffusion.corruption import (
    Batch,
    NoisyBatch,
    clean_batch,
    complementary_mask,
    concat_noisy_and_clean,
    corrupt,
)
from dlm_jax.diffusion.fused_loss import HeadPlan
from dlm_jax.diffusion.loss import LossSums, cross_entropy, loss_sums, token_nll, top1_correct
from dlm_jax.diffusion.objective import ObjectiveConfig, check_mask_token, noise_batch
from dlm_jax.diffusion.schedule import NoiseSchedule, anneal_ratio, block_times, sample_times
from dlm_jax.diffusion.spec import BlockSpec, DiffusionSpec

__all__ = [
    "Batch", "BlockSpec", "DiffusionSpec", "HeadPlan", "LossSums", "NoiseSchedule", "NoisyBatch", "ObjectiveConfig",
    "anneal_ratio", "block_times", "check_mask_token", "clean_batch", "complementary_mask", "concat_noisy_and_clean",
    "corrupt", "cross_entropy", "loss_sums", "noise_batch", "sample_times", "token_nll", "top1_correct",
]
