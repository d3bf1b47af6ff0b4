"""Trains the shipped base model: a small GPT-2 that writes simple English stories, from random weights.

    python assets/build_base.py corpus    --stories=DIR --out=build/stories
    python assets/build_base.py tokenizer --out=build/stories
    dlm train --config=stories_ar --workdir=build/stories/run
"""

from dlm_jax.cli.config import train_defaults


def get_config():
    config = train_defaults()
    config.num_steps = 2600  # about 12 epochs of 0.9 million tokens
    config.model.source = "build/stories/base"  # config.json and tokenizer, no weights
    config.model.init = "random"
    config.data.train = ("build/stories/train.jsonl",)
    config.data.validation = ("build/stories/validation.jsonl",)
    config.data.length = 256
    config.data.batch_size = 16
    config.objective.name = "autoregressive"
    config.optimizer.learning_rate = 2e-3
    config.optimizer.b2 = 0.98
    config.optimizer.weight_decay = 0.1
    config.optimizer.warmup_steps = 100
    config.optimizer.final_fraction = 0.02
    config.checkpoint.every = 200
    config.validation.every = 200
    config.validation.num_rows = 192
    config.validation.num_samples = 1
    config.log.every = 20
    return config
