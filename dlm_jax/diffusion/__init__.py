"""The mathematics of absorbing (masked) diffusion: pure functions of arrays.

How a token becomes a loss:

    Batch ── sample_times ── corrupt ─────────▶ NoisyBatch ──▶ model ──▶ hidden states ── loss_sums ──▶ LossSums
    tokens,    schedule      corruption         tokens with      ▲       [batch, length,     loss       nats, summed
    noisable                                    masks, targets,  │        embed]
    mask                                        loss mask,       │
      │                                         weights          │
      └── attention_mask ── objective ──▶ AttentionMask ─────────┘

`objective.noise_batch` runs the left half and returns (NoisyBatch, AttentionMask); `config.ObjectiveConfig` chooses
the noise, the attention and the weights. Block diffusion concatenates noisy and clean copies
(`concat_noisy_and_clean`). The autoregressive objective is the same path without corruption, under a causal mask.
`fused_loss` applies the output head only where the loss mask is set, in chunks. `spec` holds what a model needs at
inference: `DiffusionSpec`, `BlockSpec`. `teacher` compares with the parent; `drafts` is what a drafter learns.
"""

from dlm_jax.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(__name__, {
    "corruption": ("Batch", "NoisyBatch", "clean_batch", "complementary_mask", "concat_noisy_and_clean", "corrupt"),
    "drafts": ("DraftBlocks", "DraftSums", "Guesses", "draft_blocks", "draft_losses", "sum_chunks"),
    "fused_loss": ("HeadPlan",),
    "loss": ("LossSums", "LossWeights", "cross_entropy", "loss_sums", "token_nll", "top1_correct"),
    "objective": ("annealing", "block_spec", "check_mask_token", "clean_causal_batch", "loss_weights", "noise_batch"),
    "schedule": ("NoiseSchedule", "anneal_ratio", "block_times", "sample_times"),
    "spec": ("BlockSpec", "DiffusionSpec"),
    "teacher": ("TeacherStates", "align_states", "hidden_distance"),
    "config": ("DraftObjective", "ObjectiveConfig", "TeacherObjective"),
})
