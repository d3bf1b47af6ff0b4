"""How block size affects quality and speed: one base adapted at one budget to full and to block diffusion, over seeds.

    python benchmarks/block_quality.py --base=assets/stories-gpt2 --data assets/stories-text/train.jsonl \\
        --validation assets/stories-text/heldout.jsonl

adapts the base by each of the variants (the parent trained further, full diffusion with annealed attention, blocks of a
constant size, blocks that grow from one token, blocks whose clean tokens attend to each other in both directions), with
the same rows in the same order for each seed. It measures the held-out bound of every run, and the perplexity under the
base and distinct-2 of its samples; and for the first seed the tokens per second, for one row and for eight at a time.
It writes docs/figures/block_quality-NAME.png and benchmarks/results/block_quality-NAME.json, and prints the table. Runs
that are done are not repeated; one that was cut short resumes. Variants that the results already hold, at the same
settings, stay in them.
"""

import argparse
import dataclasses
import json
import pathlib

import harness
import numpy as np

from dlm_jax import DiffusionLM
from dlm_jax.data.config import DataConfig
from dlm_jax.diffusion import ObjectiveConfig
from dlm_jax.evaluation import autoregressive_nll
from dlm_jax.sampling import SamplerConfig
from dlm_jax.storage import write_json
from dlm_jax.training import TrainConfig, read_records, train
from dlm_jax.training.config import CheckpointConfig, LogConfig, ModelSource, ValidationConfig
from dlm_jax.training.optimizer import OptimizerConfig

SIZES = (4, 8, 16, 32)
KINDS = ("", ", grown", ", block-bidirectional clean")
OLD_KIND = ", read whole"  # how older results name the last of them
VARIANTS = ("parent", "full diffusion", *(f"blocks of {size}{kind}" for kind in KINDS for size in SIZES))
THRESHOLDS = (0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
COLORS = ("#222222", "#888888", "#00798c", "#1b6ca8", "#edae49", "#d1495b")


def objective_of(variant: str, num_steps: int) -> ObjectiveConfig:
    """Returns the objective; growing blocks double over the first half of the run, annealing takes a third."""
    if variant == "parent":
        return ObjectiveConfig(name="autoregressive")
    if variant == "full diffusion":
        return ObjectiveConfig(anneal_steps=num_steps // 3)
    size, schedule = int(variant.split()[2].rstrip(",")), ()
    if variant.endswith("grown"):
        sizes = [2**power for power in range(size.bit_length())]
        schedule = tuple((number * num_steps // 2 // (len(sizes) - 1), one) for number, one in enumerate(sizes))
    clean = "block_bidirectional" if variant.endswith(KINDS[2]) else "causal"
    return ObjectiveConfig(name="block_diffusion", block_size=size, block_size_schedule=schedule, clean_attention=clean)


def configure(args: argparse.Namespace, variant: str, seed: int) -> TrainConfig:
    """Returns the config of a run; variants differ only in what they are named after."""
    num_steps = args.tokens // (args.batch_size * args.length)
    return TrainConfig(
        seed=seed, num_steps=num_steps, model=ModelSource(source=args.base, mask_token=args.mask_token),
        data=DataConfig(train=tuple(args.data), validation=tuple(args.validation), length=args.length,
                        batch_size=args.batch_size, cache_dir=str(args.work / "data")),
        objective=objective_of(variant, num_steps),
        optimizer=OptimizerConfig(learning_rate=args.learning_rate, warmup_steps=num_steps // 20, b2=0.99),
        validation=ValidationConfig(every=num_steps, num_rows=args.validation_rows, num_samples=8),
        checkpoint=CheckpointConfig(every=num_steps, keep=1, keep_best=False),
        log=LogConfig(every=max(1, num_steps // 20), tensorboard=False))


def samplers(variant: str, args: argparse.Namespace) -> dict[str, SamplerConfig]:
    """Returns the samplers of a variant: autoregressive for the parent, several thresholds for the others."""
    choice = {"temperature": args.temperature, "top_p": args.top_p}
    if variant == "parent":
        ways = {"left to right": SamplerConfig("autoregressive", **choice)}
    else:
        thresholds = THRESHOLDS[3:] if variant.endswith(KINDS[1:]) else THRESHOLDS
        ways = {f"threshold {threshold}": SamplerConfig("threshold", threshold=threshold, **choice)
                for threshold in thresholds}
    return ways | {f"{name}, temperature {temperature}": dataclasses.replace(config, temperature=temperature)
              for name, config in ways.items() for temperature in args.temperatures}


def score_samples(lm: DiffusionLM, judge: DiffusionLM, ways: dict[str, SamplerConfig],
            args: argparse.Namespace) -> dict[str, dict]:
    """Returns for each sampler the perplexity under the judge, distinct-2, and forward passes per text."""
    found = {}
    for name, config in ways.items():
        texts = harness.sample_texts(lm, config, args.length, args.num_samples, 8, args.sample_seed)
        nats = autoregressive_nll(judge.model, texts["tokens"], np.ones(texts["tokens"].shape, bool)).nats_per_token
        found[name] = {"perplexity": float(np.exp(nats)), "distinct_2": harness.distinct(texts["tokens"][:, 1:], 2),
                       "forwards": texts["forwards"]}
    return found


def workdir_of(args: argparse.Namespace, variant: str, seed: int) -> pathlib.Path:
    return args.work / args.name / f"{variant.replace(', ', '-').replace(' ', '_')}-{seed}"


def measure(args: argparse.Namespace, variant: str, seed: int, judge: DiffusionLM) -> dict:
    """Trains a run unless it is done, and returns its measurements."""
    workdir = workdir_of(args, variant, seed)
    path = workdir / "measured.json"
    done = json.loads(path.read_text()) if path.exists() else {"bounds": [], "written": {}}
    if not done["bounds"]:
        if train(configure(args, variant, seed), workdir)["interrupted"]:
            raise SystemExit("interrupted; the same command resumes it")
        done["bounds"] = [(record["step"], record["bound"]) for record in read_records(workdir, "validation")]
    missing = {name: way for name, way in samplers(variant, args).items() if name not in done["written"]}
    if missing:
        done["written"] |= score_samples(DiffusionLM.from_pretrained(workdir), judge, missing, args)
        write_json(path, done)
    return done


def speeds(args: argparse.Namespace, variant: str) -> dict[str, dict[str, float]]:
    """Returns the tokens per second of each sampler, by the number of rows."""
    lm = DiffusionLM.from_pretrained(workdir_of(args, variant, seed=0))
    return {name: {str(rows): harness.sample_texts(
        lm, config, args.length, args.num_timed * rows, rows, args.sample_seed)["tokens_per_second"]
                   for rows in (1, 8)} for name, config in samplers(variant, args).items()}


def plot(found: dict[str, list[dict]], speed: dict[str, dict], path: pathlib.Path) -> None:
    """Plots the held-out bound by block size, and perplexity against tokens per second."""
    from matplotlib.ticker import LogLocator, NullLocator

    with harness.figure(path, 3, (14, 4.2)) as (left, *rest):
        final = {variant: np.array([run["bounds"][-1][1] for run in runs]) for variant, runs in found.items()}
        for kind, color in zip(KINDS, ("#1b6ca8", "#d1495b", "#edae49"), strict=True):
            sizes = [size for size in SIZES if f"blocks of {size}{kind}" in final]
            values = [final[f"blocks of {size}{kind}"] for size in sizes]
            if sizes:
                left.errorbar(sizes, [x.mean() for x in values], [x.std() for x in values], marker="o", color=color,
                              label=f"blocks{kind or ', at once'}", capsize=3)
        for variant, style in (("parent", ":"), ("full diffusion", "--")):
            if variant in final:
                left.axhline(final[variant].mean(), color="black", linestyle=style, linewidth=1, label=variant)
        left.set_xscale("log", base=2)
        left.set_xticks(SIZES, map(str, SIZES))
        left.set(xlabel="tokens per block", ylabel="held-out bound (nats per token)")
        shown = [variant for variant in found if not variant.endswith(KINDS[1:])]
        for rows, axes in zip(("1", "8"), rest, strict=True):
            for variant in shown:
                runs = found[variant]
                ways = {name: rates for name, rates in speed[variant].items() if "temperature" not in name}
                axes.plot([ways[way][rows] for way in ways],
                          [np.mean([run["written"][way]["perplexity"] for run in runs]) for way in ways], "o-",
                          label=variant, color=COLORS[VARIANTS.index(variant)], linewidth=1.5, markersize=4)
            axes.set(xlabel=f"tokens a second, {rows} row{'s' * (rows != '1')} at a time", xscale="log", yscale="log",
                     ylabel="perplexity of samples under the base")
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axis.set_major_formatter("{x:,.0f}")
                axis.set_minor_locator(NullLocator())
        left.legend(frameon=False, fontsize=8)
        rest[0].legend(frameon=False, fontsize=8)


def table(found: dict[str, list[dict]], speed: dict[str, dict]) -> str:
    lines = [harness.table_head("variant", "bound", "sampler", "perplexity", "distinct-2", "forward passes",
                                "tokens/s, 1 row", "tokens/s, 8 rows")]
    for variant, runs in found.items():
        bounds = np.array([run["bounds"][-1][1] for run in runs])
        for way in runs[0]["written"]:
            mean = {name: np.mean([run["written"][way][name] for run in runs]) for name in runs[0]["written"][way]}
            lines.append(f"| {variant} | {bounds.mean():.3f} ± {bounds.std():.3f} | {way} | {mean['perplexity']:.1f} | "
                         f"{mean['distinct_2']:.3f} | {mean['forwards']:.1f} | {speed[variant][way]['1']:,.0f} | "
                         f"{speed[variant][way]['8']:,.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = harness.parser(__doc__, seeds=3, tokens=300000, batch_size=8, length=128, validation_rows=64,
                            num_samples=32, num_timed=4, sample_seed=0, learning_rate=0.0015, temperature=1.0,
                            top_p=0.95)
    parser.add_argument("--base", required=True, help="the AR base model: a directory or hub id")
    parser.add_argument("--data", nargs="+", required=True, help="paths or globs of text")
    parser.add_argument("--validation", nargs="+", required=True, help="paths or globs of held-out text")
    parser.add_argument("--mask_token", default="<|mask|>")
    parser.add_argument("--name", help="of the figure and the results (default: the base's)")
    parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path("build/block_quality"))
    parser.add_argument("--variants", nargs="+", default=VARIANTS, choices=VARIANTS)
    parser.add_argument("--temperatures", nargs="*", type=float, default=[], help="further temperatures")
    args = parser.parse_args()
    args.name = args.name or pathlib.Path(args.base).name
    about = {"settings": {key: value for key, value in vars(args).items() if isinstance(value, int | float)},
             "files": [pathlib.Path(path).name for path in (args.base, *args.data, *args.validation)]}
    name = f"block_quality-{args.name}"
    known = harness.read_json(name, about | {"runs": {}, "tokens_per_second": {}})
    for key in ("runs", "tokens_per_second"):
        known[key] = {variant.replace(OLD_KIND, KINDS[2]): value for variant, value in known[key].items()}
    if any(known[key] != about[key] for key in about):
        parser.error(f"results/{name}.json has other settings or files; give these runs another --name")

    judge = DiffusionLM.from_pretrained(args.base)
    found: dict[str, list[dict]] = {variant: [] for variant in args.variants}
    for seed in range(args.seeds):
        for variant in args.variants:
            found[variant].append(measure(args, variant, seed, judge))
            print(f"{variant}, seed {seed}: {found[variant][-1]['bounds'][-1][1]:.3f} nats per token", flush=True)
    speed = {variant: speeds(args, variant) for variant in args.variants}
    found, speed = known["runs"] | found, known["tokens_per_second"] | speed
    harness.write_results(name, about | {"runs": found, "tokens_per_second": speed}, "jax", "flax", "optax")
    plot(found, speed, harness.FIGURES / f"{name}.png")
    print(table(found, speed))


if __name__ == "__main__":
    main()
