"""A DSpark drafter for the small base under assets/: minutes on two cores, without a network or other data.

    dlm train --config=dspark_stories --workdir=DIR
    dlm sample --model=stories-gpt2 --drafter=DIR --prompt="Once upon a time"

It reads stories that the base itself wrote. The drafter has two layers as in Qwen3, so that inference engines load it,
and guesses 4 tokens at a time. Not published settings.
"""

from dlm_jax.cli.config import load_recipe


def get_config():
    small, config = load_recipe("quickstart"), load_recipe("dspark_smollm2")
    config.model.source = small.model.source
    config.model.default_mask_token = "ÿ"  # the byte 255, which no UTF-8 text has
    config.data.train = small.data.train
    config.data.validation = small.data.validation
    config.num_steps = 600

    config.drafter.num_layers = 2
    config.drafter.init = "random"
    config.drafter.target_layer_ids = (1, 2)
    config.drafter.block_size = 4
    config.drafter.markov_rank = 64
    return config
