"""A DFlash drafter for Qwen3-8B: 5 layers that guess 15 tokens at a time (arXiv 2602.06036).

    dlm train --config=dflash_qwen3_8b --workdir=DIR --config.data.train=CONVERSATIONS.jsonl

CONVERSATIONS are prompts (the paper's are 800K of Nemotron v2 and CodeAlpaca) whose answers Qwen3-8B wrote, with the
chat template and the thinking mode in which it will be served: answers of others teach the drafter what its target
does not write. Layers, blocks, anchors, length, epochs, weights of guesses, learning rate and its schedule are the
paper's; the batch of 256 conversations is a choice, as it is not published.
"""

from dlm_jax.cli.config import train_defaults


def get_config():
    config = train_defaults()
    config.num_steps = 18_750  # 6 epochs of 800K conversations

    config.model.source = "Qwen/Qwen3-8B"
    config.model.mask_token = 151_669  # a row of the embedding that no token has, as in the published drafter
    config.model.dtype = "bfloat16"
    config.model.remat = "full"
    config.drafter.target_dtype = "bfloat16"

    config.drafter.num_layers = 5
    config.drafter.num_target_layers = 5
    config.drafter.block_size = 16

    config.objective.name = "drafter"
    config.objective.drafts.num_anchors = 512
    config.objective.drafts.decay = 7.0

    config.data.length = 3072
    config.data.batch_size = 256
    config.data.validation_fraction = 0.001
    config.data.examples.format = "messages"
    config.data.examples.train_on_padding = False
    config.data.examples.overlong = "truncate"

    config.optimizer.accumulate_steps = 8
    config.optimizer.learning_rate = 6e-4
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 750  # 4%
    config.optimizer.clip_norm = 1.0

    config.validation.every = 500
    config.validation.num_rows = 256
    config.validation.num_samples = 1
    config.checkpoint.every = 500
    return config
