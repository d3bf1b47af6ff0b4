"""SmolLM2-135M-Instruct that drafts from random tokens, its text unchanged bit for bit, after Uno (arXiv 2609.04010).

    dlm train --config=uno_smollm2 --workdir=DIR --config.data.train=TEXT
    dlm sample --model=DIR --drafter=self --prompt="Once upon a time"

The objective of uno_llama3_8b at the budget of smollm2_135m. Not published settings.
"""

from dlm_jax.cli.config import load_recipe


def get_config():
    config = load_recipe("smollm2_135m")
    config.lora.rank = 32
    config.lora.where = "noised"
    config.lora.frozen_dtype = "float32"

    config.objective.name = "block_diffusion"
    config.objective.anneal_steps = 0
    config.objective.block_size = 4
    config.objective.noise = "random_tokens"
    config.objective.noised_weight = 0.0
    config.objective.teacher.distribution_weight = 1.0
    config.objective.teacher.divergence = "tv"

    config.optimizer.learning_rate = 1e-3
    return config
