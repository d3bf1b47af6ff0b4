"""Trains the shipped block diffusion model: the small stories base, adapted to write four tokens at a time.

    python assets/build_base.py corpus    --stories=DIR --out=build/stories
    python assets/write_stories.py --model=assets/stories-gpt2 --out=build/own --seed=1 --train_bytes=8000000
    dlm train --config=stories_blocks --workdir=build/blocks

It reads real stories and, mostly, stories that the base wrote: as many as one likes, so that none is learned by heart.
"""

from dlm_jax.cli.config import load_recipe


def get_config():
    config = load_recipe("quickstart")
    config.num_steps = 6_000
    config.model.dropout = 0.0  # the noise is different each time a text is read
    config.data.train = ("build/stories/train.jsonl", "build/own/train.jsonl")
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
