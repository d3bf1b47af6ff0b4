"""Quality against cost of samples: policies by number of steps, and cached decoding in blocks.

    python benchmarks/sampling_quality.py --model=WORKDIR --parent=assets/stories-gpt2

Unconditional samples are scored by generative perplexity under the autoregressive parent (lower is more likely, but
repetition is likely, too) and by distinct-n, the number of different n-grams divided by the number of n-grams of all
samples (higher is more diverse). The baseline of both is text that the parent samples autoregressively. Prints two
tables and writes benchmarks/results/sampling_quality.json and docs/figures/sampling_quality.png.
"""

import argparse
import dataclasses
import pathlib

import harness
import jax
import numpy as np

from dlm_jax import DiffusionLM
from dlm_jax.evaluation import autoregressive_nll
from dlm_jax.sampling import SamplerConfig

COLORS = {"random": "#8d96a3", "first_hitting": "#5c6470", "confidence": "#1b6ca8", "margin": "#2a9d8f",
           "entropy": "#edae49", "threshold": "#d1495b"}
BLOCK = 32


def sample_texts(lm: DiffusionLM, config: SamplerConfig, args: argparse.Namespace, batch_size: int) -> dict:
    return harness.sample_texts(lm, config, args.length, args.num_samples, batch_size, args.seed)


def score(parent: DiffusionLM, tokens: np.ndarray) -> dict:
    """Returns the generative perplexity with its standard error over samples, and distinct-1, -2 and -3."""
    estimate = autoregressive_nll(parent.model, tokens, np.ones(tokens.shape, bool))
    per_row = np.array([row.nats_per_token for row in estimate.rows])
    perplexity = float(np.exp(per_row.mean()))
    return {"perplexity": perplexity, "perplexity_error": perplexity * per_row.std() / len(per_row) ** 0.5,
            **{f"distinct_{n}": harness.distinct(tokens[:, 1:], n) for n in (1, 2, 3)}}


def policies(lm: DiffusionLM, parent: DiffusionLM, args: argparse.Namespace) -> list[dict]:
    rows = []
    settings = [SamplerConfig(policy=policy, num_steps=steps, temperature=args.temperature, top_p=args.top_p)
                for policy in ("random", "confidence", "margin", "entropy") for steps in args.steps]
    settings += [SamplerConfig(policy="first_hitting", temperature=args.temperature, top_p=args.top_p)]
    settings += [SamplerConfig(policy="threshold", threshold=threshold, temperature=args.temperature, top_p=args.top_p)
                 for threshold in (0.3, 0.5, 0.7, 0.9)]
    for config in settings:
        sampled = sample_texts(lm, config, args, args.batch_size)
        rows.append({"policy": config.policy, "steps": config.num_steps, "threshold": config.threshold,
                     **score(parent, sampled.pop("tokens")), **sampled})
        print(f"| {config.policy}{f' {config.threshold}' if config.threshold else ''} | {config.num_steps or ''} | "
              f"{sampled['forwards']:.1f} | {format_row(rows[-1])} | {sampled['tokens_per_second']:,.0f} |", flush=True)
    return rows


def caches(lm: DiffusionLM, parent: DiffusionLM, args: argparse.Namespace) -> list[dict]:
    """Measures decoding in blocks, one row at a time, without and with caches."""
    base = SamplerConfig(policy="confidence", num_steps=args.length, temperature=args.temperature, top_p=args.top_p)
    quick = dataclasses.replace(base, policy="threshold", num_steps=None, block_length=BLOCK, threshold=args.threshold)
    settings = {"confidence, one token per step": base,
                "the same in blocks": dataclasses.replace(base, block_length=BLOCK),
                "blocks, threshold": quick}
    for cache in ("prefix", "dual"):
        settings[f"blocks, threshold, {cache} cache"] = dataclasses.replace(quick, cache=cache)
        settings[f"blocks, threshold, {cache} cache, refreshed every 4 steps"] = dataclasses.replace(
            quick, cache=cache, cache_refresh_interval=4)
    rows = []
    for name, config in settings.items():
        sampled = sample_texts(lm, config, args, 1)
        rows.append({"name": name, **score(parent, sampled.pop("tokens")), **sampled})
        gain = rows[-1]["tokens_per_second"] / rows[0]["tokens_per_second"]
        print(f"| {name} | {sampled['forwards']:.1f} | {format_row(rows[-1])} | {sampled['tokens_per_second']:,.0f} | "
              f"{gain:.2f} |", flush=True)
    return rows


def format_row(row: dict) -> str:
    return (f"{row['perplexity']:.1f} ± {row['perplexity_error']:.1f} | " +
            " | ".join(f"{row[f'distinct_{n}']:.3f}" for n in (1, 2, 3)))


def plot(rows: list[dict], baseline: dict, path: pathlib.Path) -> None:
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    with harness.figure(path, 2, (11, 4.2)) as axes:
        for axis, key, title in zip(axes, ("perplexity", "distinct_2"),
                                    ("Generative perplexity under the parent", "distinct-2"), strict=True):
            for policy in dict.fromkeys(row["policy"] for row in rows):
                points = sorted((row["forwards"], row[key]) for row in rows if row["policy"] == policy)
                axis.plot(*zip(*points, strict=True), marker="o", markersize=4, label=policy.replace("_", " "),
                          color=COLORS[policy])
            axis.axhline(baseline[key], color="black", linestyle=":", linewidth=1)
            axis.annotate("parent, left to right", (0.02, baseline[key]), xycoords=("axes fraction", "data"),
                          fontsize=8, xytext=(0, 3), textcoords="offset points")
            axis.set(xscale="log", xlabel="forward passes", title=title)
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter(ScalarFormatter())
            axis.grid(alpha=0.25)
        axes[0].set_yscale("log")
        axes[0].yaxis.set_major_formatter(ScalarFormatter())
        axes[0].yaxis.set_minor_formatter(NullFormatter())
        axes[1].legend(frameon=False, fontsize=9)


def main() -> None:
    parser = harness.parser(__doc__, length=128, num_samples=32, batch_size=16, temperature=1.0, top_p=0.95,
                            threshold=0.3, seed=0)
    parser.add_argument("--model", required=True, help="a diffusion model")
    parser.add_argument("--parent", required=True, help="the autoregressive model it was adapted from")
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 8, 16, 32, 64, 127])
    parser.add_argument("--figures", type=pathlib.Path, default=harness.FIGURES)
    args = parser.parse_args()

    lm, parent = DiffusionLM.from_pretrained(args.model), DiffusionLM.from_pretrained(args.parent)
    head = "perplexity | distinct-1 | distinct-2 | distinct-3 | tokens/s |"
    config = SamplerConfig(policy="autoregressive", temperature=args.temperature, top_p=args.top_p)
    baseline = sample_texts(parent, config, args, args.batch_size)
    baseline = {**score(parent, baseline.pop("tokens")), **baseline}
    print(f"{args.num_samples} samples of {args.length} tokens, temperature {args.temperature}, top-p {args.top_p}, "
          f"{jax.devices()[0].device_kind}\n\nOne row at a time, blocks of {BLOCK}, threshold {args.threshold}:\n\n"
          f"| decoding | forward passes | {head} gain |\n" + "| --- " * 8 + "|")
    by_cache = caches(lm, parent, args)
    print(f"\nAll policies, {args.batch_size} rows at a time:\n\n| policy | steps | forward passes | {head}\n"
          + "| --- " * 8 + "|")
    print(f"| parent, left to right | | {baseline['forwards']:.1f} | {format_row(baseline)} | "
          f"{baseline['tokens_per_second']:,.0f} |")
    by_policy = policies(lm, parent, args)
    plot(by_policy, baseline, args.figures / "sampling_quality.png")
    harness.write_results("sampling_quality", {
        "settings": {key: str(value) for key, value in vars(args).items()}, "parent": baseline, "policies": by_policy,
        "caches": by_cache}, "jax", "flax")


if __name__ == "__main__":
    main()
