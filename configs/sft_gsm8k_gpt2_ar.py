r"""GPT-2 medium fine-tuned on GSM8K from left to right: what the paper compares DiffuGPT-M with.

    dlm train --config=sft_gsm8k_gpt2_ar --workdir=DIR --config.data.train=TRAIN.txt

The data, the rows and the budget of sft_gsm8k_gpt2; padding, which is nothing to learn from left to right, is ignored.
LLaMA's parent, with the learning rate and the 40 epochs of the release:

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
