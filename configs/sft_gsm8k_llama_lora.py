"""DiffuLLaMA fine-tuned on GSM8K by LoRA, as in the paper (arXiv 2410.17891) and its adapter diffullama-gsm.

    dlm train --config=sft_gsm8k_llama_lora --workdir=DIR --config.data.train=TRAIN.txt

with lines `question||<<a*b=c>> <<...>> #### answer`, the augmented symbolic form of GSM8K. LoRA on every projection
but the head, and the full embedding. From the DiffuLLaMA reference implementation: rank 16 (the paper says 8:
--config.lora.rank=8), alpha twice the rank, the mask 811, the separator 4936 and the padding 30399, which is noised and
scored. Its batch is 128 rows per GPU, for an unstated number of GPUs; 64,000 steps are those of the checkpoint that it
evaluates. This recipe differs from the reference in
    objective.loss_normalization   all noisable tokens, as in the bound; the reference divides by the masked tokens
and in times that are stratified over the batch.
"""

from dlm_jax.cli.config import load_recipe


def get_config():
    config = load_recipe("sft_gsm8k_gpt2")
    config.num_steps = 64_000

    config.model.source = "diffusionfamily/diffullama"
    config.model.default_mask_token = 811
    config.model.remat = "full"

    config.lora.rank = 16
    config.lora.embedding = True

    config.data.batch_size = 128
    config.data.examples.separator = "========"  # token 4936
    config.data.examples.pad_token = "¨"  # token 30399
    config.data.examples.split_digits = False  # LLaMA's tokenizer splits digits itself

    config.optimizer.learning_rate = 1e-4

    config.validation.num_generations = 0
    config.checkpoint.every = 2_000
    config.checkpoint.keep = 4
    return config
