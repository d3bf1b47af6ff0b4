"""Tulu 3 8B, of LLaMA 3.1, that drafts 8 tokens for itself: LoRA of rank 128 at masks alone (arXiv 2507.11851).

    dlm train --config=gated_lora_llama3_8b --workdir=DIR --config.data.train=CONVERSATIONS.jsonl

The paper's are the base, the rank, the masks and 50,000 steps; it trains on 8 A100. It appends masks after every
prefix, and adds a loss between the states of masks and those of the base. Here a row of masks beside each text has a
block after every ninth token, and the loss is cross-entropy. Learning rate and batch are not published.
"""

from dlm_jax.cli.config import load_recipe


def get_config():
    config = load_recipe("gated_lora_smollm2")
    config.num_steps = 50_000

    config.model.source = "allenai/Llama-3.1-Tulu-3-8B"
    config.model.default_mask_token = "<|reserved_special_token_0|>"
    config.model.dtype = "bfloat16"
    config.model.remat = "full"
    config.mesh.fsdp = -1

    config.lora.rank = 128
    config.lora.frozen_dtype = "bfloat16"

    config.data.length = 2048
    config.data.batch_size = 8
    config.data.examples.format = "messages"

    config.objective.block_size = 9

    config.optimizer.learning_rate = 2e-4
    config.optimizer.warmup_steps = 2_000
    config.optimizer.b2 = 0.999

    config.validation.every = 1_000
    config.validation.num_samples = 1
    config.checkpoint.every = 1_000
    config.log.every = 50
    return config
