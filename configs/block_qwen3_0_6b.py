"""Qwen3-0.6B, adapted to write blocks of 4 tokens one after another, in the manner of SDAR (arXiv 2510.06303).

    dlm train --config=block_qwen3_0_6b --workdir=DIR --config.data.train=TEXT

SDAR adapts Qwen3 from 1.7B on in blocks of 4, clean ones read whole, weighted by 1/t, and enlarges blocks while
fine-tuning; of its learning rate for 50B tokens nothing was found, and the constant 1e-5 is that of its released
fine-tuning. The budget here is 1B tokens, a choice. Theirs predicts a token from its own position; ours keeps the
parent's shift.
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
