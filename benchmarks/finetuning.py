"""What fine-tuning on GSM8K's steps teaches a small model, by diffusion and from left to right, at one budget.

    dlm train --config=quickstart --workdir=build/adapted
    python benchmarks/finetuning.py --adapted=build/adapted --data TRAIN.txt --validation VALID.txt \\
        --test TEST.txt

fine-tunes, on lines `question||<<a*b=c>> #### answer`, the shipped small model adapted to diffusion, the same model by
diffusion without having been adapted, and from left to right; and asks each of them the questions of the test.
It writes docs/figures/finetuning.png and benchmarks/results/finetuning.json, and prints the table. Runs that are done
are not repeated; one that was cut short resumes.
"""

import argparse
import importlib.metadata
import json
import pathlib

from dlm_jax.cli.config import build_config, load_recipe
from dlm_jax.cli.main import main as command_line
from dlm_jax.cli.train import make_hooks
from dlm_jax.storage import write_json
from dlm_jax.training import TrainConfig, read_records, train

RESULTS = pathlib.Path(__file__).parent / "results" / "finetuning.json"
FIGURE = pathlib.Path(__file__).parents[1] / "docs" / "figures" / "finetuning.png"
VARIANTS = {"adapted, by diffusion": "#1b6ca8", "parent, by diffusion": "#edae49", "parent, left to right": "#d1495b"}


def configure(args: argparse.Namespace, variant: str) -> TrainConfig:
    """One run; only what the variant names differs between variants. What fills a row behind the answer is learnt from
    left to right too, so that losses are of the same tokens."""
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


def asked(args: argparse.Namespace, workdir: pathlib.Path) -> dict:
    """What the finished run makes of the test's questions."""
    out = workdir / "answers.json"
    command = ["evaluate", f"--model={workdir}", "--examples", *args.test, f"--limit={args.limit}", "--batch_size=32",
               f"--json={out}"]
    if not out.exists() and (status := command_line(command)):
        raise SystemExit(status)
    found = json.loads(out.read_text())
    return {**found["values"], "nats_per_token": found["nats_per_token"], "num_examples": found["num_examples"],
            "shown": found["records"][:3]}


def draw(curves: dict[str, dict[str, list[dict]]], path: pathlib.Path) -> None:
    """Loss and share of answers in form against steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), constrained_layout=True)
    for variant, curve in curves.items():
        for axes, kind, name in ((left, "validation", "bound"), (right, "generation", "in_form")):
            axes.plot([record["step"] for record in curve[kind]], [record[name] for record in curve[kind]], "o-",
                      color=VARIANTS[variant], label=variant, linewidth=2, markersize=4)
    left.set(xlabel="steps", ylabel="held-out answers, nats per token", yscale="log")
    right.set(xlabel="steps", ylabel="share of held-out answers in form", ylim=(-0.03, 1.03))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)
    plt.close(figure)


def table(found: dict[str, dict]) -> str:
    lines = ["| model | nats per token | in form | right number | same text |", "| --- | --- | --- | --- | --- |"]
    for variant, row in found.items():
        cells = [f"{row[name]['mean']:.3f} ± {row[name]['standard_error']:.3f}"
                 for name in ("in_form", "marked_number", "exact_match")]
        lines.append(f"| {variant} | {row['nats_per_token']:.3f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapted", required=True, help="the small model adapted to diffusion: a workdir")
    for name in ("data", "validation", "test"):
        parser.add_argument(f"--{name}", nargs="+", required=True, help="files of lines")
    parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path("build/finetuning"))
    parser.add_argument("--num_steps", type=int, default=3000)
    parser.add_argument("--batch_size", type=int, default=24)
    parser.add_argument("--length", type=int, default=128, help="longer examples are left out")
    parser.add_argument("--learning_rate", type=float, default=1.5e-3)
    parser.add_argument("--limit", type=int, default=200, help="questions of the test")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    args = parser.parse_args()

    curves, found = {}, {}
    for variant in args.variants:
        workdir = args.work / variant.replace(", ", "-").replace(" ", "_")
        if train(config := configure(args, variant), workdir, make_hooks(config))["interrupted"]:
            raise SystemExit("stopped; the same command goes on from there")
        curves[variant] = {kind: read_records(workdir, kind) for kind in ("validation", "generation")}
        found[variant] = asked(args, workdir)
    write_json(RESULTS, {
        "settings": {key: value for key, value in vars(args).items() if isinstance(value, int | float)},
        "files": [pathlib.Path(path).name for path in (*args.data, *args.validation, *args.test)],
        "test": found, "curves": curves,
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax")}})
    draw(curves, FIGURE)
    print(table(found))


if __name__ == "__main__":
    main()
