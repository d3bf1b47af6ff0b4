"""Qwen3-0.6B, adapted to what inference engines serve as SDAR (arXiv 2510.06303): `dlm export --layout=sdar`.

    dlm train --config=sdar_qwen3_0_6b --workdir=DIR --config.data.train=TEXT

The settings of block_qwen3_0_6b, and as in SDAR a token is predicted from its own position. The engines fix the mask
token's id as that of the first new token of Qwen3's tokenizer, which `<|mask|>` gets here.
"""

from dlm_jax.cli.config import load_recipe


def get_config():
    config = load_recipe("block_qwen3_0_6b")
    config.objective.shift = False
    return config
