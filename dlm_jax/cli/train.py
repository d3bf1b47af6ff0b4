"""Trains by a recipe: adapts a pretrained model to diffusion, or trains an autoregressive one.

  dlm train --config=quickstart --workdir=runs/first --config.num_steps=500 --config.optimizer.learning_rate=1e-4

The same command line again resumes a run that was stopped, and says so when a finished one has nothing left to do.
"""

import argparse

from dlm_jax.cli.config import build_config, describe_config
from dlm_jax.cli.recipes import load_recipe, recipe_names
from dlm_jax.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, metavar="RECIPE",
                        help=f"a Python file with get_config(), or one of {', '.join(recipe_names())}")
    parser.add_argument("--workdir", metavar="DIR", help="where checkpoints, metrics and logs go")
    parser.add_argument("--print_config", action="store_true",
                        help="show every key with its value and meaning, and stop")
    parser.add_argument("--config.KEY", dest="overrides", metavar="VALUE", default=[],
                        help="sets one key of the recipe; any number of these, in any order")


def run(arguments: argparse.Namespace) -> None:
    recipe = load_recipe(arguments.config)
    from dlm_jax.training.config import TrainConfig

    config = build_config(TrainConfig, recipe, arguments.overrides)
    if arguments.print_config:
        print("\n".join(describe_config(config)))
        return
    if arguments.workdir is None:
        raise ConfigError("--workdir is missing: name a directory for checkpoints, metrics and logs")
    if not config.data.train:
        raise ConfigError(f"the recipe {arguments.config} names no text: give files, globs or a directory made by "
                          "`dlm prepare` with --config.data.train=FILES")
    from dlm_jax.training.loop import train

    if train(config, arguments.workdir)["interrupted"]:
        raise KeyboardInterrupt
