"""The mathematics of absorbing diffusion: pure functions of arrays."""

from dlm_jax.diffusion.corruption import NoisyBatch, clean_batch, complementary_mask, concat_noisy_and_clean, corrupt
from dlm_jax.diffusion.fused_loss import HeadPlan
from dlm_jax.diffusion.loss import LossSums, cross_entropy, loss_sums, token_nll, top1_correct
from dlm_jax.diffusion.schedule import NoiseSchedule, anneal_ratio, block_times, sample_times
from dlm_jax.diffusion.spec import BlockSpec, DiffusionSpec
from dlm_jax.random import annealing_seed, dropout_seeds, example_keys

__all__ = [
    "BlockSpec", "DiffusionSpec", "NoisyBatch", "HeadPlan", "LossSums", "NoiseSchedule", "anneal_ratio", "annealing_seed",
    "concat_noisy_and_clean", "block_times", "complementary_mask", "corrupt", "cross_entropy", "dropout_seeds", "example_keys",
    "top1_correct", "loss_sums", "sample_times", "token_nll", "clean_batch",
]
