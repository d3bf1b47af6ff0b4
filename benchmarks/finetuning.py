"""How well a small model learns GSM8K's steps by diffusion and autoregressively, at one budget.

    dlm train --config=quickstart --workdir=build/adapted
    python benchmarks/finetuning.py --adapted=build/adapted --data TRAIN.txt --validation VALID.txt \\
        --test TEST.txt

fine-tunes, on lines `question||<<a*b=c>> #### answer`, the shipped small model adapted to diffusion, the same model by
diffusion without the adaptation, and autoregressively; and evaluates each on the questions of the test.
It writes docs/figures/finetuning.png and benchmarks/results/finetuning.json, and prints the table. Runs that are done
are not repeated; one that was cut short resumes.
"""

import argparse
import json
import pathlib

import harness

from dlm_jax.cli.config import build_config, load_recipe
from dlm_jax.cli.main import main as command_line
from dlm_jax.cli.train import extra_hooks
from dlm_jax.training import TrainConfig, read_records, train

VARIANTS = {"adapted, by diffusion": "#1b6ca8", "parent, by diffusion": "#edae49", "parent, left to right": "#d1495b"}


def configure(args: argparse.Namespace, variant: str) -> TrainConfig:
    """Returns the config of a run; variants differ only in what they are named after.

    Padding is trained on, autoregressively too, so that all losses are of the same tokens.
    """
    recipe = load_recipe("sft_addition")
    recipe.num_steps = args.num_steps
    if variant.startswith("adapted"):
        recipe.model.source = args.adapted
    recipe.data.train, recipe.data.validation = tuple(args.data), tuple(args.validation)
    recipe.data.length, recipe.data.batch_size = args.length, args.batch_size
    recipe.data.examples.overlong = "drop"
    if variant.endswith("left to right"):
        recipe.objective.name = "autoregressive"
    recipe.optimizer.learning_rate = args.learning_rate
    recipe.validation.every = args.num_steps // 5
    recipe.checkpoint.every, recipe.checkpoint.keep = args.num_steps, 1
    return build_config(TrainConfig, recipe)


def answers(args: argparse.Namespace, workdir: pathlib.Path) -> dict:
    """Returns the scores of the finished run on the test's questions."""
    out = workdir / "answers.json"
    command = ["evaluate", f"--model={workdir}", "--examples", *args.test, f"--limit={args.limit}", "--batch_size=32",
               f"--json={out}"]
    if not out.exists() and (status := command_line(command)):
        raise SystemExit(status)
    found = json.loads(out.read_text())
    return {**found["values"], "nats_per_token": found["nats_per_token"], "num_examples": found["num_examples"],
            "shown": found["records"][:3]}


def plot(curves: dict[str, dict[str, list[dict]]], path: pathlib.Path) -> None:
    """Plots the loss, and the share of answers in the right format, against steps."""
    with harness.figure(path, 2, (9, 3.6)) as (left, right):
        for variant, curve in curves.items():
            for axes, kind, name in ((left, "validation", "bound"), (right, "generation", "well_formed")):
                axes.plot([record["step"] for record in curve[kind]], [record[name] for record in curve[kind]], "o-",
                          color=VARIANTS[variant], label=variant, linewidth=2, markersize=4)
        left.set(xlabel="steps", ylabel="held-out answers, nats per token", yscale="log")
        right.set(xlabel="steps", ylabel="share of held-out answers in the right format", ylim=(-0.03, 1.03))
        left.legend(frameon=False)


def table(found: dict[str, dict]) -> str:
    lines = [harness.table_head("model", "nats per token", "right format", "right number", "same text")]
    for variant, row in found.items():
        cells = [f"{row[name]['mean']:.3f} ± {row[name]['standard_error']:.3f}"
                 for name in ("well_formed", "strict_match", "exact_match")]
        lines.append(f"| {variant} | {row['nats_per_token']:.3f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = harness.parser(__doc__, num_steps=3000, batch_size=24, length=128, learning_rate=0.0015, limit=200)
    parser.add_argument("--adapted", required=True, help="the small model adapted to diffusion: a workdir")
    for name in ("data", "validation", "test"):
        parser.add_argument(f"--{name}", nargs="+", required=True, help="files of lines")
    parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path("build/finetuning"))
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    args = parser.parse_args()

    curves, found = {}, {}
    for variant in args.variants:
        workdir = args.work / variant.replace(", ", "-").replace(" ", "_")
        if train(config := configure(args, variant), workdir, extra_hooks(config))["interrupted"]:
            raise SystemExit("interrupted; the same command resumes it")
        curves[variant] = {kind: read_records(workdir, kind) for kind in ("validation", "generation")}
        found[variant] = answers(args, workdir)
    harness.write_results("finetuning", {
        "settings": {key: value for key, value in vars(args).items() if isinstance(value, int | float)},
        "files": [pathlib.Path(path).name for path in (*args.data, *args.validation, *args.test)],
        "test": found, "curves": curves}, "jax", "flax", "optax")
    plot(curves, harness.FIGURES / "finetuning.png")
    print(table(found))


if __name__ == "__main__":
    main()
