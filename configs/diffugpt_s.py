"""DiffuGPT-S: GPT-2 small, adapted on 131B tokens of FineWeb (arXiv 2410.17891).

    dlm train --config=diffugpt_s --workdir=DIR --config.data.train=FINEWEB

The paper uses 30B unique tokens of FineWeb sample-100BT. This recipe follows the paper. It differs from the DiffuLLaMA
reference implementation in
    objective.loss_normalization   all noisable tokens, as in the bound; the reference divides by the masked tokens
    objective.share_annealed_mask  one attention mask per example; the reference shares one per batch
    validation                     always bidirectional; the reference uses the present annealed mask
and in times that are stratified over the batch.
"""

from dlm_jax.cli.config import train_defaults


def get_config():
    config = train_defaults()
    config.num_steps = 1_000_000

    config.model.source = "gpt2"  # with its dropout of 0.1, as the paper
    config.model.default_mask_token = 10541  # an existing token
    config.model.dtype = "bfloat16"

    config.data.length = 512
    config.data.batch_size = 256
    config.data.validation_fraction = 0.0005

    config.objective.anneal_steps = 10_000

    config.optimizer.learning_rate = 3e-4
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 2_000
    config.optimizer.b2 = 0.999
    config.optimizer.weight_decay = 0.0
    config.optimizer.clip_norm = 1.0

    config.validation.every = 1_000
    config.checkpoint.every = 10_000
    return config
