"""Plans a recipe for TPU slices or GPUs that are not attached: whether it fits, what it sends, how long it takes.

  dlm plan --config=diffullama_7b --topology=v5e:16x16,v5p:2x4x4
  dlm plan --config=diffugpt_s --topology=v5litepod-8 --config.data.batch_size=512 --suggest
  dlm plan --config=diffugpt_m --gpu=h100:8

For a TPU, the step of `dlm train` is compiled by the TPU's own compiler on this host's CPU, in a few minutes per slice:
it fits if the compiler accepts it. For GPUs, its memory is estimated. Times are estimates, by the formula in
docs/guides/plan.md. Only config.json of the base model is read. Exit status: 0 everything fits, 1 an error, 2 wrong
usage, 3 something does not fit.
"""

import argparse
import dataclasses
import os
import sys

from dlm_jax.cli.config import build_config, load_recipe, recipe_names
from dlm_jax.cli.paths import check_base
from dlm_jax.cli.shared import add_json_argument, write_result
from dlm_jax.errors import EXIT_DOES_NOT_FIT, EXIT_OK, ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, metavar="RECIPE",
                        help=f"a Python file with get_config(), or one of {', '.join(recipe_names())}")
    parser.add_argument("--topology", nargs="+", action="extend", default=[], metavar="NAME",
                        help="TPU slices: v5e:4x4,v5p:2x2x4, or cloud names: v5litepod-16,v4-32; "
                             "2xv5e:16x16 for two slices")
    parser.add_argument("--gpu", nargs="+", action="extend", default=[], metavar="NAME:COUNT",
                        help="GPUs by description: h100:8,a100-80:64")
    parser.add_argument("--suggest", action="store_true",
                        help="if the recipe does not fit, also try settings that would, in a few more compilations")
    parser.add_argument("--config.KEY", dest="overrides", metavar="VALUE", default=[],
                        help="sets one key of the recipe, as for `dlm train`; any number of these, in any order")
    add_json_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    if not arguments.topology and not arguments.gpu:
        raise ConfigError("nothing to plan for: name TPU slices with --topology=v5e:4x4, or GPUs with --gpu=h100:8")
    os.environ["JAX_PLATFORMS"] = "cpu"  # before JAX starts: attached accelerators are not used
    recipe = load_recipe(arguments.config)
    from dlm_jax.training.config import TrainConfig, flat_dict

    config = build_config(TrainConfig, recipe, arguments.overrides)
    if config.model.source:
        check_base(config.model.source)
    from dlm_jax import plan as planning
    from dlm_jax.matmul import resolve_dtype
    from dlm_jax.plan import report

    dtype = resolve_dtype(config.model.dtype, "tpu", 1)  # the same on GPUs
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=dtype))
    base, config = planning.describe_base(config)
    targets = [make(config, base.config, name) for make, names in
               ((planning.tpu_target, arguments.topology), (planning.gpu_target, arguments.gpu))
               for name in ",".join(names).split(",") if name]
    for target in targets:  # check all before compiling the first, which takes minutes
        planning.check_plan(config, base, target.mesh)

    lines, plans = report.recipe_lines(config, base), []
    for target in targets:
        def progress(text: str, name: str = target.name) -> None:
            print(f"{name}: {text}", file=sys.stderr, flush=True)

        progress(f"{'compiling' if target.is_compiled_for else 'estimating'} data.batch_size={config.data.batch_size}")
        plan, trials = planning.make_plan(config, base, target), []
        lines += ["", *report.plan_lines(plan)]
        if arguments.suggest and not plan.memory.fits:
            trials = planning.suggest(config, base, target, plan, progress)
            lines += report.suggestion_lines(trials)
        plans.append({"plan": dataclasses.asdict(plan), "suggestions": [dataclasses.asdict(trial) for trial in trials]})
    lines += ["", "Times are estimates, not measurements; docs/guides/plan.md has the formula and published figures."]
    fits = all(entry["plan"]["memory"]["fits"] for entry in plans)
    content = {"recipe": arguments.config, "config": flat_dict(config), "model": dataclasses.asdict(base), "fits": fits,
               "plans": plans}
    write_result(arguments.json, content, "\n".join(lines))
    return EXIT_OK if fits else EXIT_DOES_NOT_FIT
