"""Qwen3-0.6B, adapted to generate one block of 4 tokens after another, as in SDAR (arXiv 2510.06303).

    dlm train --config=block_qwen3_0_6b --workdir=DIR --config.data.train=TEXT

SDAR adapts Qwen3 from 1.7B on, in blocks of 4 with bidirectional attention inside clean blocks, weighted by 1/t, and
enlarges the blocks during fine-tuning. Its learning rate for 50B tokens is not published; the constant 1e-5 is that of
its published fine-tuning. The budget of 1B tokens is a choice. SDAR predicts a token from its own position; here the
parent's shift stays, and sdar_qwen3_0_6b is without it.
"""

from dlm_jax.cli.config import load_recipe


def get_config():
    config = load_recipe("qwen3_0_6b")
    config.objective.name = "block_diffusion"
    config.objective.anneal_steps = 0
    config.objective.block_size = 4
    config.objective.clean_attention = "block_bidirectional"

    config.optimizer.learning_rate = 1e-5
    config.optimizer.schedule = "constant"
    config.optimizer.warmup_steps = 60
    return config
