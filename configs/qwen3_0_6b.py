"""Qwen3-0.6B on one accelerator: 1B tokens with annealed attention. Not from the paper.

    dlm train --config=qwen3_0_6b --workdir=DIR --config.data.train=FINEWEB

The settings of llama3_1b. The mask is a new token, for which Qwen's embedding has a free row.
"""

from dlm_jax.cli.config import load_recipe


def get_config():
    config = load_recipe("llama3_1b")
    config.model.source = "Qwen/Qwen3-0.6B-Base"
    config.model.default_mask_token = "<|mask|>"
    return config
