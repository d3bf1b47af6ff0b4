"""Llama-3.2-1B on one accelerator: 1B tokens with annealed attention. Not from the paper, whose LLaMA has 7B.

    dlm train --config=llama3_1b --workdir=DIR --config.data.train=SLIMPAJAMA

The settings of diffullama_7b with 1/65 of its tokens, annealed over a tenth of the run, with a learning rate for a
smaller model. The mask is one of Llama 3's reserved tokens, so that the vocabulary does not grow.
"""

from dlm_jax.cli.config import load_recipe


def get_config():
    config = load_recipe("diffullama_7b")
    config.num_steps = 2_000

    config.model.source = "meta-llama/Llama-3.2-1B"
    config.model.default_mask_token = 128_002  # <|reserved_special_token_0|>

    config.data.batch_size = 256
    config.optimizer.accumulate_steps = 16
    config.optimizer.learning_rate = 1e-4
    config.optimizer.warmup_steps = 100
    config.optimizer.schedule = "cosine"
    config.objective.anneal_steps = 200
    return config
