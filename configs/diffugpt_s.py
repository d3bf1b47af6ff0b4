"""DiffuGPT-S: GPT-2 small, adapted on 131B tokens of FineWeb (arXiv 2410.17891).

    dlm train --config=diffugpt_s --workdir=DIR --config.data.train=FINEWEB

The paper takes 30B unique tokens of FineWeb sample-100BT. It departs from the authors' code, not from their paper, in
    objective.loss_normalization      maskable tokens: the bound itself; theirs divides by the masked ones ("masked")
    objective.share_annealed_mask   one attention pattern an example; theirs shares one in a batch
    validation                always bidirectional; theirs sees the attention of the moment
and draws times stratified over the batch, which theirs does not.
"""

from dlm_jax.cli.config import train_defaults


def get_config():
    config = train_defaults()
    config.num_steps = 1_000_000

    config.model.source = "gpt2"  # with its dropout of 0.1, as the paper
    config.model.mask_token = 10541  # an existing token
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
