"""Times texts by length, one at a time: the parent from left to right with its cache, diffusion by number of steps.

    python benchmarks/sampling_length.py --model=WORKDIR --parent=assets/stories-gpt2

The figure of the paper on decoding speed (arXiv 2410.17891) for any model. Compilation is not counted; each length has
its own program; the settings run in turns. Prints a table and writes benchmarks/results/sampling_length.json and
docs/figures/sampling_length.png.
"""

import argparse
import importlib.metadata
import json
import pathlib
import platform
import statistics
import time

import jax
import numpy as np

from dlm_jax import DiffusionLM
from dlm_jax.sampling import SamplerConfig, SamplingSpec, sample

HERE = pathlib.Path(__file__).parent
COLORS = ("#1b6ca8", "#2a9d8f", "#edae49", "#d1495b", "#8d96a3")


def time_text(lm: DiffusionLM, config: SamplerConfig, length: int, seed: int) -> float:
    """Returns the seconds for one text of `length` tokens."""
    tokens, fixed = np.zeros((1, length), np.int32), np.arange(length)[None] == 0
    keys = jax.random.split(jax.random.key(seed), 1)
    spec = SamplingSpec(config, lm.pretrained.diffusion)
    start = time.perf_counter()
    jax.block_until_ready(sample(lm.model, tokens, fixed, np.array([length]), keys, spec))
    return time.perf_counter() - start


def plot(results: dict[str, list[float]], lengths: list[int], device: str, path: pathlib.Path) -> None:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    colors = iter(COLORS)
    for name, seconds in results.items():
        parent = name.startswith("parent")
        axis.plot(lengths, seconds, marker="o", markersize=4, label=name, color="black" if parent else next(colors),
                  linestyle="--" if parent else "-")
    axis.set(xlabel="tokens", ylabel="seconds per text", title=f"One text at a time, {device}", ylim=(0, None))
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a diffusion model")
    parser.add_argument("--parent", required=True, help="the autoregressive model it was adapted from")
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 64, 96, 128, 160, 192, 224, 256])
    parser.add_argument("--steps", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--policy", default="random")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--figures", type=pathlib.Path, default=HERE.parent / "docs" / "figures")
    args = parser.parse_args()

    lm, parent = DiffusionLM.from_pretrained(args.model), DiffusionLM.from_pretrained(args.parent)
    settings = {"parent, left to right with its cache": (parent, SamplerConfig(policy="autoregressive"))}
    settings |= {f"diffusion, {steps} steps": (lm, SamplerConfig(policy=args.policy, num_steps=steps))
                 for steps in args.steps}
    settings["diffusion, blocks of 32, threshold 0.7, dual cache"] = (lm, SamplerConfig(
        policy="threshold", threshold=0.7, block_length=32, cache="dual"))
    results: dict[str, list[float]] = {name: [] for name in settings}
    print("| tokens | " + " | ".join(settings) + " |\n" + "| --- " * (len(settings) + 1) + "|")
    for length in args.lengths:
        seconds = {name: [] for name in settings}
        for repeat in range(args.repeats + 1):
            for name, (model, config) in settings.items():
                seconds[name].append(time_text(model, config, length, repeat))
        for name, values in seconds.items():
            results[name].append(statistics.median(values[1:]))  # the first of each compiles
        print(f"| {length} | " + " | ".join(f"{values[-1]:.3f}" for values in results.values()) + " |", flush=True)
    device = jax.devices()[0].device_kind
    plot(results, args.lengths, device, args.figures / "sampling_length.png")
    (HERE / "results" / "sampling_length.json").write_text(json.dumps({
        "settings": {key: str(value) for key, value in vars(args).items()}, "lengths": args.lengths,
        "seconds": results, "device": device, "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "flax")},
    }, indent=1) + "\n")


if __name__ == "__main__":
    main()
