"""Qwen3-30B-A3B, a mixture of experts: 1B tokens with annealed attention. Not from the paper.

    dlm train --config=qwen3_30b_a3b --workdir=DIR --config.data.train=FINEWEB --config.mesh.expert=8

On a TPU slice `mesh.expert` keeps each expert on one of eight chips. Without it every chip gathers all experts of a
layer. The mask is a new token, for which Qwen's embedding has a free row. The load-balancing loss is the checkpoint's.
"""

from dlm_jax.cli.config import load_recipe


def get_config():
    config = load_recipe("llama3_1b")
    config.model.source = "Qwen/Qwen3-30B-A3B-Base"
    config.model.default_mask_token = "<|mask|>"

    config.data.length = 4096
    config.data.batch_size = 128
    config.optimizer.accumulate_steps = 1
    config.optimizer.learning_rate = 2e-5
    return config
