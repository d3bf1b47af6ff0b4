"""What each ingredient of the adaptation contributes: held-out bound against tokens seen, over seeds.

    python assets/build_base.py corpus --stories=DIR --out=build/stories
    python benchmarks/adaptation.py --base=DIR --data build/stories/train.jsonl \\
        --validation build/stories/validation.jsonl

trains from one base model at one budget, with the same rows in the same order for each seed:
`adapted` (shift and annealed attention), `no annealing` (bidirectional from the start), `no shift` and `random
weights`. It writes OUT/figures/adaptation.png and benchmarks/results/adaptation.json, and prints the table.
Runs that are done are not repeated; one that was cut short resumes.
"""

import argparse
import dataclasses
import pathlib
import time

import harness
import numpy as np

from dlm_jax.checkpoints import load_pretrained
from dlm_jax.data.config import DataConfig
from dlm_jax.data.corpus import load_rows
from dlm_jax.diffusion import ObjectiveConfig
from dlm_jax.evaluation import autoregressive_nll
from dlm_jax.training import TrainConfig, read_records, train
from dlm_jax.training.config import CheckpointConfig, LogConfig, ModelSource, ValidationConfig
from dlm_jax.training.optimizer import OptimizerConfig

VARIANTS = ("adapted", "no annealing", "no shift", "random weights")
COLORS = dict(zip(VARIANTS, ("#1b6ca8", "#d1495b", "#edae49", "#8d96a3"), strict=True))


def configure(args: argparse.Namespace, variant: str, seed: int) -> TrainConfig:
    """Returns the config of a run; variants differ only in what they are named after."""
    num_steps = args.tokens // (args.batch_size * args.length)
    return TrainConfig(
        seed=seed,
        num_steps=num_steps,
        model=ModelSource(source=args.base, init="random" if variant == "random weights" else "pretrained",
                          mask_token="<|mask|>"),
        data=DataConfig(train=tuple(args.data), validation=tuple(args.validation), length=args.length,
                        batch_size=args.batch_size, cache_dir=str(args.work / "data")),
        objective=ObjectiveConfig(shift=variant != "no shift",
                                  anneal_steps=0 if variant == "no annealing" else num_steps // 3),
        optimizer=OptimizerConfig(learning_rate=args.learning_rate, warmup_steps=num_steps // 20, weight_decay=0.0),
        validation=ValidationConfig(every=num_steps // 10, num_rows=args.validation_rows, num_samples=8),
        checkpoint=CheckpointConfig(every=num_steps, keep=1, keep_best=False),
        log=LogConfig(every=max(1, num_steps // 20), tensorboard=False),
    )


def curve(workdir: pathlib.Path, tokens_per_step: int) -> list[tuple[int, float]]:
    """Returns (tokens seen, held-out bound in nats per token) at every validation."""
    return [(record["step"] * tokens_per_step, record["bound"]) for record in read_records(workdir, "validation")]


def parent_nll(config: TrainConfig) -> float:
    """Returns the base model's own autoregressive loss on the same held-out rows, nats per token."""
    parent = load_pretrained(config.model.source, mask_token=config.model.mask_token)
    _, rows = load_rows(config.data, parent.tokenizer, vocab_size=parent.model.config.vocab_size,
                        cache_dir=config.data.cache_dir)
    tokens = rows[np.arange(min(len(rows), config.validation.num_rows))].tokens.astype(np.int32)
    return autoregressive_nll(parent.model, tokens, np.ones(tokens.shape, bool)).nats_per_token


def summarize(curves: dict[str, list[list[tuple[int, float]]]]) -> dict[str, dict[str, float]]:
    """Returns the final bound of each variant: mean and standard deviation over seeds."""
    final = {variant: np.array([runs[-1][1] for runs in seeds]) for variant, seeds in curves.items()}
    return {variant: {"mean": float(x.mean()), "std": float(x.std(ddof=1)) if len(x) > 1 else 0.0, "seeds": len(x)}
            for variant, x in final.items()}


def plot(curves: dict[str, list[list[tuple[int, float]]]], parent: float, path: pathlib.Path) -> None:
    """Plots the mean over seeds, with the range of the seeds as a band."""
    with harness.figure(path) as (axes,):
        for variant, seeds in curves.items():
            tokens = np.array([point[0] for point in seeds[0]]) / 1e6
            values = np.array([[point[1] for point in run] for run in seeds])
            axes.plot(tokens, values.mean(0), color=COLORS[variant], label=variant, linewidth=2)
            axes.fill_between(tokens, values.min(0), values.max(0), color=COLORS[variant], alpha=0.2, linewidth=0)
        axes.axhline(parent, color="black", linestyle="--", linewidth=1)
        axes.annotate("AR parent (exact)", (tokens[-1], parent), textcoords="offset points", xytext=(0, 4), ha="right")
        late = np.concatenate([[point[1] for point in run[1:]] for seeds in curves.values() for run in seeds])
        axes.set_ylim(parent - 0.1, late.max() + 0.1)
        axes.set(xlabel="training tokens seen (millions)", ylabel="held-out bound (nats per token)")
        axes.legend(frameon=False)


def table(summary: dict[str, dict[str, float]], parent: float) -> str:
    lines = [harness.row(variant, f"{row['mean']:.3f} ± {row['std']:.3f}", f"{row['mean'] - parent:+.3f}")
             for variant, row in summary.items()]
    head = harness.table_head("start and objective", "held-out bound (nats per token)", "gap to the AR parent")
    return "\n".join([head, *lines, harness.row("AR parent, exact", f"{parent:.3f}", "")])


def main() -> None:
    parser = harness.parser(__doc__, seeds=3, tokens=2_500_000, batch_size=16, length=128, learning_rate=1e-3,
                            validation_rows=256)
    parser.add_argument("--base", required=True, help="the AR base model: a directory or hub id")
    parser.add_argument("--data", nargs="+", required=True, help="paths or globs of text")
    parser.add_argument("--validation", nargs="+", required=True, help="paths or globs of held-out text")
    parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path("adaptation_runs"))
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("docs"))
    parser.add_argument("--variants", nargs="+", default=VARIANTS, choices=VARIANTS)
    args = parser.parse_args()

    curves: dict[str, list[list[tuple[int, float]]]] = {variant: [] for variant in args.variants}
    start = time.time()
    for seed in range(args.seeds):
        for variant in args.variants:
            config = configure(args, variant, seed)
            workdir = args.work / f"{variant.replace(' ', '_')}-{seed}"
            if train(config, workdir)["interrupted"]:
                raise SystemExit("interrupted; the same command resumes it")
            curves[variant].append(curve(workdir, config.data.batch_size * config.data.length))
            print(f"{variant}, seed {seed}: {curves[variant][-1][-1][1]:.3f} nats per token", flush=True)
    parent, summary = parent_nll(config), summarize(curves)

    harness.write_results("adaptation", {
        "settings": {key: str(value) for key, value in vars(args).items()}, "parent_nll": parent, "final": summary,
        "curves": curves, "config": dataclasses.asdict(configure(args, "adapted", 0)), "seconds": time.time() - start,
    }, "jax", "flax", "optax")
    plot(curves, parent, args.out / "figures" / "adaptation.png")
    print(table(summary, parent))


if __name__ == "__main__":
    main()
