r"""GPT-2 medium fine-tuned on GSM8K autoregressively: the paper's baseline for DiffuGPT-M.

    dlm train --config=sft_gsm8k_gpt2_ar --workdir=DIR --config.data.train=TRAIN.txt

Data, rows and budget are those of sft_gsm8k_gpt2, without a loss on padding. LLaMA's parent, with the learning rate and
the 40 epochs of the DiffuLLaMA reference implementation:

    dlm train --config=sft_gsm8k_llama_lora --workdir=DIR --config.data.train=TRAIN.txt \
        --config.objective.name=autoregressive --config.model.source=meta-llama/Llama-2-7b-hf \
        --config.data.examples.train_on_padding=false --config.optimizer.learning_rate=3e-4 --config.num_steps=120000
"""

from dlm_jax.cli.config import load_recipe


def get_config():
    config = load_recipe("sft_gsm8k_gpt2")
    config.model.source = "gpt2-medium"
    config.objective.name = "autoregressive"
    config.data.examples.train_on_padding = False
    config.validation.num_samples = 1
    return config
