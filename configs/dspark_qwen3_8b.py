"""A DSpark drafter for Qwen3-8B: 5 layers and a Markov head that guess 7 tokens at a time (arXiv 2607.05147).

    dlm train --config=dspark_qwen3_8b --workdir=DIR --config.data.train=CONVERSATIONS.jsonl

CONVERSATIONS are 1.3M prompts of open-perfectblend, answered by Qwen3-8B at temperature 0.7. All settings are the
paper's.
"""

from dlm_jax.cli.config import load_recipe


def get_config():
    config = load_recipe("dflash_qwen3_8b")
    config.num_steps = 25_390  # 10 epochs of 1.3M conversations

    config.drafter.block_size = 7
    config.drafter.sample_from_anchor = True
    config.drafter.markov_rank = 256
    config.drafter.confidence_head = True

    config.objective.drafts.decay = 4.0
    config.objective.drafts.cross_entropy = 0.1
    config.objective.drafts.l1 = 0.9
    config.objective.drafts.confidence = 1.0

    config.data.length = 4096
    config.data.batch_size = 512

    config.optimizer.accumulate_steps = 16
    config.optimizer.warmup_steps = 1_016  # 4%
    return config
