"""Qwen3-8B that drafts 1 and then 2 tokens beside its own next one: I-DLM (arXiv 2604.11035), 4.5B tokens.

    dlm train --config=idlm_qwen3_8b --workdir=DIR --config.data.train=CONVERSATIONS.jsonl

CONVERSATIONS are prompts with answers that Qwen3-8B itself wrote (`dlm sample --prompts`). All answer tokens are
masked, and the clean copy keeps its AR loss. Published are the learning rate and its schedule, warm-up, batch, weight
of the clean loss, and strides of 2 and then 3; when the stride changes is a choice. In I-DLM's README the masks of a
block see only those before them; here, as in NeMo's recipe, they see their block.

    dlm sample --model=DIR --policy=autoregressive --drafter=self --prompt="Once upon a time"
"""

from dlm_jax.cli.config import train_defaults


def get_config():
    config = train_defaults()
    config.num_steps = 34_000  # 4.5B tokens

    config.model.source = "Qwen/Qwen3-8B"
    config.model.default_mask_token = "<|mask|>"  # id 151669, for which the embedding has a row
    config.model.dtype = "bfloat16"
    config.model.remat = "full"
    config.mesh.fsdp = -1

    config.data.length = 4096
    config.data.batch_size = 32
    config.data.examples.format = "messages"

    config.objective.name = "block_diffusion"
    config.objective.block_size = 3
    config.objective.block_size_schedule = ((0, 2), (17_000, 3))
    config.objective.noise = "all_masked"
    config.objective.clean_weight = 0.2

    config.optimizer.learning_rate = 1e-5
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 1_020  # 3%
    config.optimizer.accumulate_steps = 2

    config.validation.every = 1_000
    config.validation.num_samples = 1
    config.checkpoint.every = 1_000
    return config
