"""GPT-2 small, adapted to generate one block of tokens after another. Not from the paper, nor any published settings.

    dlm train --config=block_gpt2 --workdir=DIR --config.data.train=FINEWEB

Data and budget are those of gpt2_one_gpu. The first hundred steps are the parent's own training, blocks of one token.
Then the block size doubles step by step, which did better than the final size at once in NBDiff (arXiv 2512.06776).
"""

from dlm_jax.cli.config import load_recipe


def get_config():
    config = load_recipe("gpt2_one_gpu")
    config.objective.name = "block_diffusion"
    config.objective.anneal_steps = 0
    config.objective.block_size = 32
    config.objective.block_size_schedule = ((0, 1), (100, 2), (500, 4), (1_000, 8), (1_500, 16), (2_000, 32))
    config.optimizer.accumulate_steps = 16  # each row has a noisy and a clean copy
    return config
