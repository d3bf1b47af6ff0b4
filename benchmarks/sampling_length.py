"""Times texts by length, one at a time: the parent, autoregressive with its cache, and diffusion by number of steps.

    python benchmarks/sampling_length.py --model=WORKDIR --parent=assets/stories-gpt2

The figure of the paper on decoding speed (arXiv 2410.17891) for any model. Compilation is not counted; each length has
its own program; the settings run in turns. Prints a table and writes benchmarks/results/sampling_length.json and
docs/figures/sampling_length.png.
"""

import pathlib
import statistics
from collections.abc import Callable

import harness
import jax
import numpy as np

from dlm_jax import DiffusionLM
from dlm_jax.sampling import SamplerConfig, SamplingSpec, sample

COLORS = ("#1b6ca8", "#2a9d8f", "#edae49", "#d1495b", "#8d96a3")


def text_sampler(lm: DiffusionLM, config: SamplerConfig, length: int) -> Callable[[int], None]:
    """Returns a function of a seed that samples one text of `length` tokens."""
    tokens, fixed = np.zeros((1, length), np.int32), np.arange(length)[None] == 0
    spec = SamplingSpec(config, lm.pretrained.diffusion)
    return lambda seed: jax.block_until_ready(
        sample(lm.model, tokens, fixed, np.array([length]), jax.random.split(jax.random.key(seed), 1), spec))


def plot(results: dict[str, list[float]], lengths: list[int], device: str, path: pathlib.Path) -> None:
    colors = iter(COLORS)
    with harness.figure(path, size=(6.4, 4.2)) as (axis,):
        for name, seconds in results.items():
            style = ("black", "--") if name.startswith("parent") else (next(colors), "-")
            axis.plot(lengths, seconds, marker="o", markersize=4, label=name, color=style[0], linestyle=style[1])
        axis.set(xlabel="tokens", ylabel="seconds per text", title=f"One text at a time, {device}", ylim=(0, None))
        axis.grid(alpha=0.25)
        axis.legend(frameon=False, fontsize=9)


def main() -> None:
    parser = harness.parser(__doc__, repeats=5)
    parser.add_argument("--model", required=True, help="a diffusion model")
    parser.add_argument("--parent", required=True, help="the autoregressive model it was adapted from")
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 64, 96, 128, 160, 192, 224, 256])
    parser.add_argument("--steps", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--policy", default="random")
    parser.add_argument("--figures", type=pathlib.Path, default=harness.FIGURES)
    args = parser.parse_args()

    lm, parent = DiffusionLM.from_pretrained(args.model), DiffusionLM.from_pretrained(args.parent)
    settings = {"parent, left to right with its cache": (parent, SamplerConfig(policy="autoregressive"))}
    settings |= {f"diffusion, {steps} steps": (lm, SamplerConfig(policy=args.policy, num_steps=steps))
                 for steps in args.steps}
    settings["diffusion, blocks of 32, threshold 0.7, dual cache"] = (lm, SamplerConfig(
        policy="threshold", threshold=0.7, block_length=32, cache="dual"))
    results: dict[str, list[float]] = {name: [] for name in settings}
    print(harness.table_head("tokens", *settings))
    for length in args.lengths:
        runs = {name: text_sampler(model, config, length) for name, (model, config) in settings.items()}
        for name, seconds in harness.time_in_turns(runs, args.repeats).items():
            results[name].append(statistics.median(seconds))
        print(harness.row(length, *(f"{values[-1]:.3f}" for values in results.values())), flush=True)
    plot(results, args.lengths, jax.devices()[0].device_kind, args.figures / "sampling_length.png")
    harness.write_results("sampling_length", {"settings": {key: str(value) for key, value in vars(args).items()},
                                              "lengths": args.lengths, "seconds": results}, "jax", "flax")


if __name__ == "__main__":
    main()
