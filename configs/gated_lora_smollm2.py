"""SmolLM2-135M-Instruct that drafts for itself: LoRA at masks alone, and an MLP on the token before each draft.

    dlm train --config=gated_lora_smollm2 --workdir=DIR --config.data.train=TEXT
    dlm sample --model=DIR --drafter=self --num_drafts=1 --prompt="Once upon a time"

What it writes is what its base writes, in fewer passes. Train it on text that the base wrote (`dlm sample --prompts`),
or on text like what it will write. Blocks have a mask at every place, three of which draft; one draft at a time is the
fastest on two cores. Not published settings.
"""

from dlm_jax.cli.config import load_recipe


def get_config():
    config = load_recipe("smollm2_135m")
    config.objective.name = "self_drafting"
    config.objective.block_size = 4
    config.objective.anneal_steps = 0
    config.objective.drafts.cross_entropy = 0.0
    config.objective.drafts.kl = 0.5
    config.objective.drafts.l1 = 0.5
    config.lora.rank = 32
    config.lora.where = "noised"
    config.lora.draft_head = True
    config.lora.frozen_dtype = "float32"
    config.optimizer.learning_rate = 1e-3
    return config
