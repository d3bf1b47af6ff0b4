"""Trains by a recipe: adapts a pretrained model to diffusion, or trains an autoregressive one.

  dlm train --config=quickstart --workdir=runs/first --config.num_steps=500 --config.optimizer.learning_rate=1e-4

The same command resumes a run that was stopped, and reports it if the run is already finished. Exit status: 0 done,
1 refused or failed, 2 wrong arguments, 75 stopped by SIGTERM and saved, 76 another process of the run died, 130 stopped
by Ctrl-C and saved; after 75, 76 and 130 the same command resumes.
"""

import argparse
import sys
from typing import TYPE_CHECKING

from dlm_jax.cli.config import build_config, describe_config, load_recipe, recipe_names
from dlm_jax.cli.paths import check_run
from dlm_jax.cli.shared import add_process_arguments, is_supervisor, join_processes, supervise
from dlm_jax.errors import EXIT_OK, EXIT_PEER_LOST, EXIT_STOPPED, ConfigError

if TYPE_CHECKING:
    from dlm_jax.training.config import TrainConfig
    from dlm_jax.training.hooks import Hook, HookFactory
    from dlm_jax.training.setup import Run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, metavar="RECIPE",
                        help=f"a Python file with get_config(), or one of {', '.join(recipe_names())}")
    parser.add_argument("--workdir", metavar="DIR", help="where checkpoints, metrics and logs go")
    parser.add_argument("--print_config", action="store_true",
                        help="show every key with its value and meaning, and stop")
    parser.add_argument("--config.KEY", dest="overrides", metavar="VALUE", default=[],
                        help="sets one key of the recipe; any number of these, in any order")
    add_process_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    recipe = load_recipe(arguments.config)
    from dlm_jax.training.config import TrainConfig

    config = build_config(TrainConfig, recipe, arguments.overrides)
    if arguments.print_config:
        print("\n".join(describe_config(config)))
        return EXIT_OK
    if arguments.workdir is None:
        raise ConfigError("--workdir is missing: name a directory for checkpoints, metrics and logs")
    if not config.data.train:
        raise ConfigError(f"the recipe {arguments.config} names no text: give files, globs or a directory made by "
                          "`dlm prepare` with --config.data.train=FILES")
    check_run(config, arguments.workdir)
    if is_supervisor(arguments):
        return supervise(arguments.argv)
    join_processes(arguments)
    import jax

    from dlm_jax.training.loop import train

    try:
        interrupted = train(config, arguments.workdir, extra_hooks(config))["interrupted"]
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        print(f"dlm train: the other processes of the run cannot be reached ({str(error).splitlines()[0]}); start all "
              "processes again to resume from the last checkpoint", file=sys.stderr)
        return EXIT_PEER_LOST
    if interrupted == "SIGINT":
        raise KeyboardInterrupt
    return EXIT_STOPPED if interrupted else EXIT_OK


def extra_hooks(config: "TrainConfig") -> "list[HookFactory]":
    """Returns the hooks of a run that the training room does not have: generated answers to held-out examples."""
    if not config.validation.num_generations:
        return []
    from dlm_jax.evaluation.generation_eval import GenerationEval
    from dlm_jax.sampling import SamplerConfig
    from dlm_jax.training.hooks import PeriodicEval

    def generation_hook(run: "Run") -> "Hook":
        config = run.config  # nothing is open there
        sampler = (SamplerConfig("autoregressive", temperature=0.0) if config.objective.name == "autoregressive"
                   else SamplerConfig("confidence", config.validation.generation_steps, temperature=0.0))
        evaluate = GenerationEval(run.base, run.held_out, run.mesh, config.data, sampler=sampler,
                                  num_examples=config.validation.num_generations)
        return PeriodicEval("generation", "sampling", evaluate, (config.validation.every,))

    return [generation_hook]
