r"""An adapted LLaMA fine-tuned by LoRA to follow instructions, on conversations or on Alpaca's records.

    dlm train --config=sft_instruct --workdir=DIR --config.data.train=TALKS.jsonl
    dlm train --config=sft_instruct --workdir=DIR --config.data.train=alpaca_data.json \
        --config.data.examples.format=alpaca
    dlm chat --model=DIR

The paper shows models that follow instructions but does not give their settings. These are those of its LoRA on GSM8K,
with what LLaDA states of its own (arXiv 2502.09992 and its guidelines): rows are padded with end-of-text tokens, which
are scored; each answer is normalized by its own length; three epochs, here of Alpaca's 52,002 records. LLaMA-2 has no
chat template: name a file with one in data.examples.chat_template, or use Alpaca's format.
"""

from dlm_jax.cli.config import load_recipe


def get_config():
    config = load_recipe("sft_gsm8k_llama_lora")
    config.num_steps = 1_200

    config.data.length = 1024
    config.data.examples.format = "messages"
    config.data.examples.separator = None  # as the base, or else a newline
    config.data.examples.pad_token = None  # the end of the text
    config.objective.loss_normalization = "per_example"

    config.optimizer.warmup_steps = 50
    config.validation.every = 100
    config.validation.num_generations = 16
    config.checkpoint.every = 200
    return config
