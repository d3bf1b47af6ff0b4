"""DiffuGPT-M: GPT-2 medium, adapted on 210B tokens of FineWeb (arXiv 2410.17891).

    dlm train --config=diffugpt_m --workdir=DIR --config.data.train=FINEWEB

As diffugpt_s, with the same differences from the reference, but longer rows, larger batches, fewer steps, and a new
token as the mask.
"""

from dlm_jax.cli.config import load_recipe


def get_config():
    config = load_recipe("diffugpt_s")
    config.num_steps = 160_000

    config.model.source = "gpt2-medium"
    config.model.default_mask_token = "<|mask|>"  # new: id 50257, the vocabulary grows to 50258

    config.data.length = 1024
    config.data.batch_size = 1280
    return config
