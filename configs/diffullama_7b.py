r"""DiffuLLaMA: Llama-2-7B, adapted on 65B tokens of SlimPajama and StarCoder (arXiv 2410.17891).

    dlm train --config=diffullama_7b --workdir=DIR --config.data.train=SLIMPAJAMA,STARCODER \
        --config.data.weights=0.693584,0.306416

with directories made by `dlm prepare` (docs/guides/data.md has the commands), in the paper's proportion. Attention is
bidirectional from the start, as in the paper; diffullama_7b_annealed anneals it. This recipe follows the paper. It
differs from the DiffuLLaMA reference implementation in
    objective.loss_normalization   all noisable tokens, as in the bound; the reference divides by the masked tokens
    data.length                    2048 tokens; the reference has rows of 2049
    model.param_dtype              float32 master parameters, computing in bfloat16; the reference loads bfloat16
and in times that are stratified over the batch.
"""

from dlm_jax.cli.config import train_defaults


def get_config():
    config = train_defaults()
    config.num_steps = 2_070  # 65B tokens

    config.model.source = "meta-llama/Llama-2-7b-hf"
    config.model.default_mask_token = 811  # an existing token
    config.model.dtype = "bfloat16"
    config.model.remat = "full"

    config.data.length = 2048
    config.data.batch_size = 15_360  # 60 rows a GPU x 64 GPUs x 4 micro-batches
    config.data.validation_fraction = 0.0005

    config.objective.anneal_steps = 0

    config.optimizer.accumulate_steps = 4
    config.optimizer.learning_rate = 2e-5
    config.optimizer.schedule = "constant"
    config.optimizer.b2 = 0.95
    config.optimizer.weight_decay = 0.1
    config.optimizer.clip_norm = 1.0

    config.validation.every = 100
    config.checkpoint.every = 100
    config.log.every = 5
    return config
