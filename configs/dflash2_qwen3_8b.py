"""A DFlash2 drafter for Qwen3-8B: DFlash with convolutions over the block, and a selector among 16 candidates.

    dlm train --config=dflash2_qwen3_8b --workdir=DIR --config.data.train=CONVERSATIONS.jsonl

Its authors have not published their training. Anchors, epochs, losses and learning rate are those of NVIDIA's NeMo
Automodel, on open-perfectblend (1.3M prompts) with answers of the target; the batch is dflash_qwen3_8b's.
"""

from dlm_jax.cli.config import load_recipe


def get_config():
    config = load_recipe("dflash_qwen3_8b")
    config.num_steps = 30_470  # 6 epochs of 1.3M conversations

    config.drafter.conv_kernel_size = 2
    config.drafter.conv_group_size = 16
    config.drafter.selector_rank = 256
    config.drafter.selector_top_k = 16

    config.objective.drafts.num_anchors = 256
    config.objective.drafts.selector = 1.0

    config.optimizer.warmup_steps = 1_219  # 4%
    return config
