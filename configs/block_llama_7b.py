"""Llama-2-7B, adapted to generate one block of 32 tokens after another, with the settings of Fast-dLLM v2's 7B.

    dlm train --config=block_llama_7b --workdir=DIR --config.data.train=SLIMPAJAMA

From arXiv 2509.26328: 2,500 steps of 256 rows of 2,048 tokens (1.3B), blocks of 32, two complementary masks without
the bound's weights, bidirectional attention inside clean blocks, AdamW, a learning rate of 1e-5 after 500 steps of
warm-up. Fast-dLLM v2 starts from Qwen2.5-7B-Instruct and fine-tunes on the answers to its prompts. It trains the first
token of a block from noise; here the clean text before the block predicts it, in training as in sampling (see
dlm_jax/diffusion/corruption.py).
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
