"""Quality against cost of samples: policies by number of steps, and cached decoding in blocks.

    python benchmarks/sampling_quality.py --model=WORKDIR --parent=assets/stories-gpt2

Unconditional samples are scored by generative perplexity under the autoregressive parent (lower is more likely, but
repetition is likely, too) and by distinct-n, the number of different n-grams divided by the number of n-grams of all
samples (higher is more diverse). The baseline of both is text that the parent samples from left to right. Prints two
tables and writes benchmarks/results/sampling_quality.json and docs/figures/sampling_quality.png.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import pathlib
import platform
import time

import jax
import numpy as np

from dlm_jax import DiffusionLM
from dlm_jax.evaluation import autoregressive_nll
from dlm_jax.random import example_keys
from dlm_jax.sampling import SamplerConfig, SamplingSpec, sample

HERE = pathlib.Path(__file__).parent
COLORS = {"random": "#8d96a3", "first_hitting": "#5c6470", "confidence": "#1b6ca8", "margin": "#2a9d8f",
           "entropy": "#edae49", "threshold": "#d1495b"}
BLOCK = 32


def sample_texts(lm: DiffusionLM, config: SamplerConfig, args: argparse.Namespace, batch_size: int) -> dict:
    """Samples unconditionally: tokens [num_samples, length], seconds without compilation, forward passes per row."""
    first = lm.pretrained.bos_token_id or lm.pretrained.eos_token_id or 0
    tokens = np.full((batch_size, args.length), first, np.int32)
    fixed = np.broadcast_to(np.arange(args.length) == 0, tokens.shape)
    lengths = np.full(batch_size, args.length)
    spec = SamplingSpec(config, lm.pretrained.diffusion)

    def run(start: int):
        index = np.arange(start, start + batch_size, dtype=np.uint32)
        return jax.block_until_ready(sample(lm.model, tokens, fixed, lengths, example_keys(args.seed, index), spec))

    run(0)
    begin = time.perf_counter()
    batches = [run(start) for start in range(0, args.num_samples, batch_size)]
    seconds = time.perf_counter() - begin
    return {"tokens": np.concatenate([batch.tokens for batch in batches])[: args.num_samples],
            "seconds": seconds, "forwards": float(np.mean([batch.steps for batch in batches])),
            "tokens_per_second": len(batches) * batch_size * (args.length - 1) / seconds}


def score(parent: DiffusionLM, tokens: np.ndarray) -> dict:
    """Returns the generative perplexity with its standard error over samples, and distinct-1, -2 and -3."""
    estimate = autoregressive_nll(parent.model, tokens, np.ones(tokens.shape, bool))
    per_row = np.array([row.nats_per_token for row in estimate.rows])
    perplexity = float(np.exp(per_row.mean()))
    return {"perplexity": perplexity, "perplexity_error": perplexity * per_row.std() / len(per_row) ** 0.5,
            **{f"distinct_{n}": distinct(tokens[:, 1:], n) for n in (1, 2, 3)}}


def distinct(tokens: np.ndarray, n: int) -> float:
    grams = np.lib.stride_tricks.sliding_window_view(tokens, n, axis=1).reshape(-1, n)
    return len(np.unique(grams, axis=0)) / len(grams)


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
    """Blocks from left to right, one row at a time, without and with caches."""
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
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for axis, key, title in zip(axes, ("perplexity", "distinct_2"),
                                ("Generative perplexity under the parent", "distinct-2"), strict=True):
        for policy in dict.fromkeys(row["policy"] for row in rows):
            points = sorted((row["forwards"], row[key]) for row in rows if row["policy"] == policy)
            axis.plot(*zip(*points, strict=True), marker="o", markersize=4, label=policy.replace("_", " "),
                      color=COLORS[policy])
        axis.axhline(baseline[key], color="black", linestyle=":", linewidth=1)
        axis.annotate("parent, left to right", (0.02, baseline[key]), xycoords=("axes fraction", "data"), fontsize=8,
                      xytext=(0, 3), textcoords="offset points")
        axis.set(xscale="log", xlabel="forward passes", title=title)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(matplotlib.ticker.ScalarFormatter())
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yscale("log")
    axes[0].yaxis.set_major_formatter(matplotlib.ticker.ScalarFormatter())
    axes[0].yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    axes[1].legend(frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a diffusion model")
    parser.add_argument("--parent", required=True, help="the autoregressive model it was adapted from")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--num_samples", type=int, default=32)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 8, 16, 32, 64, 127])
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top_p", type=float, default=0.95)
    parser.add_argument("--threshold", type=float, default=0.3, help="of the cached decoding")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figures", type=pathlib.Path, default=HERE.parent / "docs" / "figures")
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
    (HERE / "results" / "sampling_quality.json").write_text(json.dumps({
        "settings": {key: str(value) for key, value in vars(args).items()}, "parent": baseline, "policies": by_policy,
        "caches": by_cache, "device": jax.devices()[0].device_kind, "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "flax")},
    }, indent=1) + "\n")


if __name__ == "__main__":
    main()
