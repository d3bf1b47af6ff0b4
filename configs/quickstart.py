"""The main job in a few minutes on two cores: the small base model under assets/ becomes a diffusion model.

    dlm train --config=quickstart --workdir=DIR

It trains on stories that the base model itself generated, so that it needs neither a network nor other data.
"""

import pathlib

from dlm_jax.cli.config import train_defaults

ASSETS = pathlib.Path(__file__).resolve().parents[1] / "assets"


def get_config():
    config = train_defaults()
    config.num_steps = 800

    config.model.source = str(ASSETS / "stories-gpt2")
    config.model.dtype = "auto"

    config.data.train = (str(ASSETS / "stories-text" / "train.jsonl"),)
    config.data.validation = (str(ASSETS / "stories-text" / "heldout.jsonl"),)
    config.data.length = 128
    config.data.batch_size = 8

    config.objective.anneal_steps = 250

    config.optimizer.learning_rate = 1.5e-3
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 40
    config.optimizer.b2 = 0.99

    config.validation.every = 200
    config.validation.num_rows = 64
    config.checkpoint.every = 400
    config.log.every = 50
    return config
