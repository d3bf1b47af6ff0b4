"""Qwen3-0.6B to full diffusion in 0.8B tokens, its hidden states held to the parent's: Repr-Align.

    dlm train --config=repr_align_qwen3_0_6b --workdir=DIR --config.data.train=TEXT

Published are the weight of the distance, over all layers, the learning rate and its end, warm-up, weight decay, length,
batch, uniform mask rates and bidirectional attention from the start. It divides the loss by the masked tokens, and
freezes embedding and head; here they are trained. Its second cross-entropy, weighted by the model's own probabilities,
is not here.
"""

from dlm_jax.cli.config import load_recipe


def get_config():
    config = load_recipe("qwen3_0_6b")
    config.num_steps = 2_000  # 0.8B tokens

    config.data.length = 4096
    config.data.batch_size = 96

    config.objective.anneal_steps = 0
    config.objective.weight = "uniform"
    config.objective.loss_normalization = "masked_tokens"
    config.objective.teacher.hidden_weight = 10.0

    config.optimizer.learning_rate = 3e-4
    config.optimizer.final_fraction = 0.01
    config.optimizer.warmup_steps = 2
    config.optimizer.weight_decay = 0.01
    config.optimizer.accumulate_steps = 12
    return config
