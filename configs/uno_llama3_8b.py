"""Llama-3.1-8B-Instruct that drafts from random tokens, its text unchanged bit for bit: Uno (arXiv 2609.04010).

    dlm train --config=uno_llama3_8b --workdir=DIR --config.data.train=CONVERSATIONS.jsonl

LoRA acts on the noised copy alone, so that the clean copy is the frozen parent, whose distribution each draft learns
by total variation. Published are rank, alpha, noise, loss, learning rate, warm-up, batch, length and three epochs of
OpenThoughts3-1.2M; of the curriculum of block sizes only that they grow. The mask token is not used in training: a
recorded model needs one, and this one is reserved.

    dlm sample --model=DIR --drafter=self --prompt="Once upon a time"
"""

from dlm_jax.cli.config import train_defaults


def get_config():
    config = train_defaults()
    config.num_steps = 28_125  # 3 epochs of 1.2M conversations

    config.model.source = "meta-llama/Llama-3.1-8B-Instruct"
    config.model.default_mask_token = 128_002  # <|reserved_special_token_0|>
    config.model.dtype = "bfloat16"
    config.model.remat = "full"
    config.mesh.fsdp = -1

    config.lora.rank = 128
    config.lora.alpha = 2048.0
    config.lora.where = "noised"

    config.data.length = 4096
    config.data.batch_size = 128
    config.data.examples.format = "messages"

    config.objective.name = "block_diffusion"
    config.objective.block_size = 8
    config.objective.block_size_schedule = ((0, 2), (4_000, 4), (12_000, 8))
    config.objective.noise = "random_tokens"
    config.objective.noised_weight = 0.0
    config.objective.teacher.distribution_weight = 1.0
    config.objective.teacher.divergence = "tv"

    config.optimizer.learning_rate = 1e-5
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 562
    config.optimizer.accumulate_steps = 4

    config.validation.every = 1_000
    config.validation.num_samples = 1
    config.checkpoint.every = 1_000
    return config
