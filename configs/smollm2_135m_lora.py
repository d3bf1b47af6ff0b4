"""SmolLM2-135M-Instruct, adapted by LoRA of rank 16 on every projection: 4.9 million parameters are trained.

    dlm train --config=smollm2_135m_lora --workdir=DIR --config.data.train=TEXT

Data, budget and annealing are those of smollm2_135m. The learning rate is higher, as is usual for LoRA. Not published
settings.
"""

from dlm_jax.cli.config import load_recipe


def get_config():
    config = load_recipe("smollm2_135m")
    config.lora.rank = 16
    config.optimizer.learning_rate = 8e-4
    return config
