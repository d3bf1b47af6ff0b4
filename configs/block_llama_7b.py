"""Llama-2-7B, adapted to write blocks of 32 tokens one after another, with the settings of Fast-dLLM v2's 7B.

    dlm train --config=block_llama_7b --workdir=DIR --config.data.train=SLIMPAJAMA

From arXiv 2509.26328: 2,500 steps of 256 rows of 2,048 tokens (1.3B), blocks of 32, two complementary views without
the bound's weights, clean blocks read whole, AdamW, a learning rate of 1e-5 after 500 steps of warm-up. Theirs begins
from Qwen2.5-7B-Instruct and is fine-tuning on its prompts' answers. It departs from theirs in how a block's first
token is predicted: from the clean text before it, in training as in writing (see dlm_jax/diffusion/blocks.py), where
theirs trains it from noise.
"""

from dlm_jax.cli.config import load_recipe


def get_config():
    config = load_recipe("diffullama_7b")
    config.num_steps = 2_500
    config.data.batch_size = 256

    config.objective.name = "block_diffusion"
    config.objective.block_size = 32
    config.objective.clean_attention = "block_bidirectional"
    config.objective.complementary = True
    config.objective.weight = "uniform"

    config.optimizer.accumulate_steps = 1
    config.optimizer.learning_rate = 1e-5
    config.optimizer.warmup_steps = 500
    config.optimizer.weight_decay = 0.0
    return config
