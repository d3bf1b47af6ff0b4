"""GPT-2 small in a day on one accelerator: 2.6B tokens instead of the paper's 131B. Not from the paper.

    dlm train --config=gpt2_one_gpu --workdir=DIR --config.data.train=FINEWEB

The settings of diffugpt_s, annealed over a tenth of the run, with a learning rate that decays to 0. The budget is a
choice; what the other 128B tokens would add was not measured.
"""

from dlm_jax.cli.config import load_recipe


def get_config():
    config = load_recipe("diffugpt_s")
    config.num_steps = 20_000
    config.objective.anneal_steps = 2_000

    config.optimizer.warmup_steps = 500
    config.optimizer.accumulate_steps = 8  # 32 rows at a time: 24 GB are enough

    config.validation.every = 500
    config.checkpoint.every = 1_000
    return config
