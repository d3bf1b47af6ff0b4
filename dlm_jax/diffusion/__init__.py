"""The mathematics of absorbing diffusion: pure functions of arrays."""

from dlm_jax.diffusion.annealing import anneal_ratio
from dlm_jax.diffusion.blocks import beside_clean, complement
from dlm_jax.diffusion.corruption import CorruptedBatch, corrupt, uncorrupted
from dlm_jax.diffusion.head_loss import HeadPlan
from dlm_jax.diffusion.loss import LossSums, cross_entropy, is_likeliest, loss_sums, token_nll
from dlm_jax.diffusion.randomness import annealing_seed, dropout_seeds, example_keys
from dlm_jax.diffusion.schedule import NoiseSchedule, block_times, sample_times

__all__ = [
    "CorruptedBatch", "HeadPlan", "LossSums", "NoiseSchedule", "anneal_ratio", "annealing_seed",
    "beside_clean", "block_times", "complement", "corrupt", "cross_entropy", "dropout_seeds", "example_keys",
    "is_likeliest", "loss_sums", "sample_times", "token_nll", "uncorrupted",
]
