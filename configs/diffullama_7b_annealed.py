"""DiffuLLaMA with annealed attention. The paper's attention kernel could not anneal; its authors expect it to help.

    dlm train --config=diffullama_7b_annealed --workdir=DIR --config.data.train=SLIMPAJAMA
"""

from dlm_jax.cli.config import load_recipe


def get_config():
    config = load_recipe("diffullama_7b")
    config.objective.anneal_steps = 100  # 3B tokens; DiffuGPT-S anneals over 1.3B, DiffuGPT-M over 13B
    return config
