"""The main job from end to end: adapts an autoregressive model to diffusion, measures it, samples it, exports it.

  dlm quickstart --base=assets/stories-gpt2 --data='assets/stories-text/train.jsonl' --workdir=quickstart

It first times a few steps and says what it will do and for how long. Then it adapts the base with annealed attention,
trains the same network from random weights with the same budget for comparison, if there is time for it, and writes a
figure and a Hugging Face export. Run it again to resume, or to see the results again.
"""

import argparse
import dataclasses
import math
import pathlib
import time
from typing import TYPE_CHECKING

from dlm_jax.cli.config import build_config, load_recipe
from dlm_jax.cli.paths import check_model
from dlm_jax.cli.quickstart_plan import (
    MINUTES,
    SAMPLED_STEPS,
    Plan,
    choose_plan,
    describe,
    scale_learning_rate,
    whole_recipe,
)
from dlm_jax.errors import ConfigError, DataError

if TYPE_CHECKING:
    from dlm_jax.checkpoints import Pretrained
    from dlm_jax.pipeline import DiffusionLM
    from dlm_jax.training import TrainConfig

FLAGS = {"data.train": "--data", "data.validation": "--validation", "model.source": "--base"}
PLAN_FILE = "plan.json"
HELD_OUT_SHARES = (0.1, 0.3)  # of the documents, where the recipe's share has no row


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", required=True, help="the autoregressive model: a directory, a GGUF file or a hub id")
    parser.add_argument("--data", required=True, nargs="+", help="paths or globs of training text")
    parser.add_argument("--validation", nargs="+", default=[],
                        help="paths or globs of held-out text (default: a share of the training text)")
    parser.add_argument("--workdir", default="quickstart", help="where everything goes (default %(default)s)")
    parser.add_argument("--minutes", type=float,
                        help="about how long everything may take (default: as the recipe says, if that is at most "
                             f"{MINUTES:g} minutes on this machine, else {MINUTES:g})")
    parser.add_argument("--prompt", default="Once upon a time", help="a text to continue (default %(default)r)")
    parser.add_argument("--infill", default="Tom was sad. He <mask:8> Then his mom helped him and he was happy.",
                        help="a text with a gap to fill (default %(default)r)")
    parser.add_argument("--config.KEY", dest="overrides", metavar="VALUE", default=[],
                        help="sets a key of the recipe quickstart; may be repeated")


def run(arguments: argparse.Namespace) -> None:
    check_model(arguments.base)
    from dlm_jax.checkpoints.source import shipped_model
    from dlm_jax.pipeline import DiffusionLM
    from dlm_jax.training import train

    started, workdir = time.time(), pathlib.Path(arguments.workdir)
    config, plan = make_config(arguments)
    runs = {"adapted": (config, workdir / "adapted")}
    if plan.compares:
        runs["random weights"] = (dataclasses.replace(config, model=dataclasses.replace(config.model, init="random")),
                                  workdir / "random_weights")
    for name, (run_config, folder) in runs.items():
        print(f"\n== training: {name}", flush=True)
        if train(run_config, folder)["interrupted"]:
            raise KeyboardInterrupt

    folders = {name: folder for name, (_, folder) in runs.items()}
    results = measure(arguments.base, config, folders, plan.num_masks)
    report(results)
    plot(folders, config, results, workdir / "quickstart.png")

    texts = sample(DiffusionLM.from_pretrained(folders["adapted"], dtype=config.model.dtype), arguments.prompt,
                   arguments.infill)
    base = shipped_model(arguments.base) or pathlib.Path(arguments.base)
    if base.resolve() == shipped_model("stories-gpt2").resolve():
        texts += sample_shipped(DiffusionLM.from_pretrained("stories", dtype=config.model.dtype), arguments.prompt)
    (workdir / "samples.txt").write_text(texts)
    DiffusionLM.from_pretrained(folders["adapted"]).save_pretrained(workdir / "export")
    print(f"\n== samples\n{texts}\n"
          f"== done in {(time.time() - started) / 60:.1f} minutes\n"
          f"  adapted model        {folders['adapted']}\n"
          f"  figure               {workdir / 'quickstart.png'}\n"
          f"  samples              {workdir / 'samples.txt'}\n"
          f"  Hugging Face export  {workdir / 'export'}\n"
          f'  sample more          dlm sample --model={folders["adapted"]} --prompt="{arguments.prompt}"')


def make_config(arguments: argparse.Namespace) -> tuple["TrainConfig", Plan]:
    """Returns the config of the adaptation and the plan that it follows, and prints what will be done and how long.

    A workdir keeps its plan, so that the same command resumes what it has started.
    """
    from dlm_jax.checkpoints import load_pretrained
    from dlm_jax.training import TrainConfig, count_params
    from dlm_jax.training.probe import probe_step

    workdir, given = pathlib.Path(arguments.workdir), {key for key, _ in arguments.overrides}
    overrides = [("model.source", arguments.base),
                 ("model.dropout", "0.0"),  # the noise is different each time a text is read
                 ("log.tensorboard", "false"),  # the figure has the curves
                 ("data.train", ",".join(arguments.data)), ("data.validation", ",".join(arguments.validation)),
                 ("data.cache_dir", str(workdir / "data")), *arguments.overrides]
    config = build_config(TrainConfig, load_recipe("quickstart"), overrides)
    base = load_pretrained(arguments.base, init="abstract")
    model, optimizer = base.model.config, config.optimizer
    config = dataclasses.replace(config, data=dataclasses.replace(
        config.data, length=min(config.data.length, model.max_length)))
    if "optimizer.learning_rate" not in given:
        rate = scale_learning_rate(optimizer.learning_rate, count_params(model))
        config = dataclasses.replace(config, optimizer=dataclasses.replace(optimizer, learning_rate=rate))
    plan = Plan.load(workdir / PLAN_FILE)
    if plan is None or arguments.minutes is not None:
        print(f"timing a few steps of {arguments.base} on this machine", flush=True)
        probe = probe_step(config)
        steps_are_given = "num_steps" in given and arguments.minutes is None
        plan = whole_recipe(config) if steps_are_given else choose_plan(config, probe, arguments.minutes)
        print(describe(plan, config, probe, arguments.base, count_params(model)), flush=True)
    else:
        print(f"plan: as before ({workdir / PLAN_FILE}), {plan.num_steps:,} steps", flush=True)
    config = hold_out(plan.apply(config), base)
    plan.save(workdir / PLAN_FILE)
    return config, plan


def hold_out(config: "TrainConfig", base: "Pretrained") -> "TrainConfig":
    """Returns the config with a share of the text held out that has at least one row, where no other text is given.

    Raises:
      DataError: the text is too short for that, or cannot be read.
    """
    from dlm_jax.data.corpus import load_rows

    shares = [config.data.validation_fraction, *HELD_OUT_SHARES] if not config.data.validation else [0.0]
    for share in shares:
        tried = dataclasses.replace(config, data=dataclasses.replace(config.data, validation_fraction=share))
        try:
            load_rows(tried.data, base.tokenizer, vocab_size=base.model.config.vocab_size,
                      cache_dir=tried.data.cache_dir)
            return tried
        except DataError:
            if share == shares[-1]:
                raise
    return config


def measure(base: str, config: "TrainConfig", runs: dict[str, pathlib.Path], num_masks: int) -> dict[str, float]:
    """Returns nats per token on the held-out rows: the parent's exact loss, and bounds before and after.

    Args:
      runs: the workdirs of the trained models, by name.
      num_masks: samples of the bound per row.
    """
    import numpy as np

    from dlm_jax.checkpoints import load_pretrained
    from dlm_jax.data.corpus import load_rows
    from dlm_jax.evaluation import autoregressive_nll, bound
    from dlm_jax.pipeline import DiffusionLM

    model = config.model
    recorded = load_pretrained(base, init="abstract", mask_token=model.mask_token).diffusion.mask_token_id
    start = DiffusionLM.from_pretrained(base, dtype=model.dtype, mask_token=(
        model.default_mask_token if recorded is None else model.mask_token))
    _, held_out = load_rows(config.data, start.tokenizer, vocab_size=start.config.vocab_size,
                            cache_dir=config.data.cache_dir)
    if held_out is None:
        raise ConfigError("there is no held-out text: give --validation files or a data.validation_fraction")
    tokens = held_out[np.arange(min(len(held_out), config.validation.num_rows))].tokens.astype(np.int32)
    noisable_mask = np.ones(tokens.shape, bool)
    results = {"the AR parent, exact": autoregressive_nll(start.model, tokens, noisable_mask).nats_per_token}
    for name, source in {"before adaptation": None, **runs}.items():
        lm = start if source is None else DiffusionLM.from_pretrained(source, dtype=config.model.dtype)
        results[name] = bound(lm.model, tokens, noisable_mask, diffusion=lm.diffusion,
                              num_samples=num_masks).nats_per_token
    return results


def report(results: dict[str, float]) -> None:
    """Prints the table, and by how much adaptation wins over random weights, if these were trained."""
    print("\n== held-out text", flush=True)
    print("  nats per token (bound for diffusion models; lower is better)   perplexity")
    for name, nats in results.items():
        print(f"  {name:<24} {nats:8.3f} {' ' * 30} {math.exp(nats):10.1f}")
    if "random weights" not in results:
        return
    margin = results["random weights"] - results["adapted"]
    print(f"  the adapted model beats random weights at equal budget by {margin:.3f} nats per token" if margin > 0 else
          f"  the adapted model does NOT beat random weights at this budget (by {margin:.3f} nats per token)")


def plot(runs: dict[str, pathlib.Path], config: "TrainConfig", results: dict[str, float],
         path: pathlib.Path) -> None:
    """Plots training loss and held-out bound of both runs over the tokens seen."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    from dlm_jax.training import read_records

    per_step = config.data.batch_size * config.data.length / 1e6
    colors = dict(zip(runs, ("#1b6ca8", "#8d96a3"), strict=False))
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True, sharey=True)
    for name, workdir in runs.items():
        for axes, kind in ((left, "train"), (right, "validation")):
            records = read_records(workdir, kind)
            axes.plot([r["step"] * per_step for r in records], [r["bound"] for r in records], color=colors[name],
                      label=name, marker="o" if kind == "validation" else None, markersize=4)
    right.axhline(results["the AR parent, exact"], color="black", linestyle="--", linewidth=1, label="AR parent, exact")
    left.set(title="training loss", xlabel="tokens seen (millions)", ylabel="bound, nats per token")
    right.set(title="held-out bound", xlabel="tokens seen (millions)")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    right.legend(frameon=False)
    figure.savefig(path, dpi=140)
    plt.close(figure)


def sample_shipped(lm: "DiffusionLM", prompt: str) -> str:
    """Samples the model that comes with the library, which was adapted from the same base for longer."""
    text, = lm.generate([prompt], max_new_tokens=96, temperature=0.7)
    return (f"\n[for comparison, the model `stories`, adapted from the same base for longer, in blocks of "
            f"{lm.diffusion.blocks.size} tokens: after the prefix {prompt!r}]\n{text.strip()}\n")


def sample(lm: "DiffusionLM", prompt: str, infill: str) -> str:
    """Samples without a prompt, after a prefix and into a gap."""
    settings = {"num_steps": SAMPLED_STEPS, "policy": "confidence", "temperature": 1.0}
    length = min(96, lm.config.max_length - 32)
    unconditional, continued = lm.generate(["", prompt], max_new_tokens=length, **settings)
    sections = {"unconditional": unconditional, f"after the prefix {prompt!r}": continued,
                f"into the gap of {infill!r}": lm.infill(infill, **settings)[0]}
    return "\n\n".join(f"[{title}]\n{text.strip()}" for title, text in sections.items()) + "\n"
