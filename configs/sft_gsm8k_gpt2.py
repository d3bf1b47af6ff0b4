"""DiffuGPT-M fine-tuned on GSM8K, all parameters, as the paper does (arXiv 2410.17891).

    dlm train --config=sft_gsm8k_gpt2 --workdir=DIR --config.data.train=TRAIN.txt

with lines `question||<<a*b=c>> <<...>> #### answer`, the augmented symbolic form of GSM8K, of which there are 385,620.
From the release's code: 128 rows a GPU, 200 epochs, the separator 50155, the padding 101, which is noised and learned,
and digits that are tokens of their own. Of how many GPUs it does not say: 8 here, as in its adaptation. For DiffuGPT-S
set --config.model.source=diffusionfamily/diffugpt-s. sft_gsm8k_gpt2_ar is the parent on the same data. It departs in
    objective.loss_normalization      maskable tokens: the bound itself; theirs divides by the masked ones ("masked")
    data.examples.overlong    left out; theirs are cut, a question at its beginning
and draws times stratified over the batch, which theirs does not.
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
    config.validation.generation_eval = 64
    config.checkpoint.every = 1_000
    return config
