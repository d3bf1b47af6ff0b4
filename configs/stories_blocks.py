"""Trains the shipped block diffusion model: the small stories base, adapted to write four tokens at a time.

    python assets/build_base.py corpus --stories=DIR --out=build/stories
    dlm train --config=stories_blocks --workdir=build/blocks

It reads the stories that the base was trained on and those that the base wrote.
"""

from dlm_jax.cli.config import load_recipe


def get_config():
    config = load_recipe("quickstart")
    config.num_steps = 3_000  # 6.1 million tokens, 5.5 epochs
    config.model.dropout = 0.0  # the noise is different each time a text is read
    config.data.train = ("build/stories/train.jsonl", *config.data.train)
    config.data.length = 256
    config.objective.name = "block_diffusion"
    config.objective.anneal_steps = 0
    config.objective.block_size = 4
    config.objective.block_size_schedule = ((0, 1), (100, 2), (500, 4))
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 100
    config.validation.every = 500
    config.checkpoint.every = 500
    return config
