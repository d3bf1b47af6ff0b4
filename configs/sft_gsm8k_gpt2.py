"""DiffuGPT-M fine-tuned on GSM8K, all parameters, as in the paper (arXiv 2410.17891).

    dlm train --config=sft_gsm8k_gpt2 --workdir=DIR --config.data.train=TRAIN.txt

with lines `question||<<a*b=c>> <<...>> #### answer`, the augmented symbolic form of GSM8K, 385,620 of them. From the
DiffuLLaMA reference implementation: 128 rows per GPU, 200 epochs, the separator 50155, the padding 101, which is noised
and scored, and one token per digit. It does not say how many GPUs: 8 here, as in its adaptation. For DiffuGPT-S set
--config.model.source=diffusionfamily/diffugpt-s. sft_gsm8k_gpt2_ar trains the parent on the same data. This recipe
differs from the reference in
    objective.loss_normalization   all noisable tokens, as in the bound; the reference divides by the masked tokens
    data.examples.overlong         dropped; the reference truncates them, a question at its start
and in times that are stratified over the batch.
"""

from dlm_jax.cli.config import train_defaults


def get_config():
    config = train_defaults()
    config.num_steps = 75_000

    config.model.source = "diffusionfamily/diffugpt-m"
    config.model.dtype = "bfloat16"

    config.data.length = 256
    config.data.batch_size = 1024
    config.data.examples.format = "gsm8k_symbolic"
    config.data.examples.separator = "======"  # token 50155
    config.data.examples.pad_token = "¨"  # token 101
    config.data.examples.train_on_padding = True
    config.data.examples.split_digits = True
    config.data.examples.overlong = "drop"

    config.objective.anneal_steps = 0  # the base is bidirectional already

    config.optimizer.learning_rate = 3e-4
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 2_000
    config.optimizer.clip_norm = 1.0

    config.validation.every = 1_000
    config.validation.num_generations = 64
    config.checkpoint.every = 1_000
    return config
