"""Measures models that were adapted from one real parent, beside it: bounds, tasks, speed, memory, and texts.

    python benchmarks/real_model.py --parent=smollm2.gguf --data_dir=DIR --work=runs/measured \\
        --models "full diffusion=runs/full" "blocks of 4=runs/blocks" \\
        --heldout stories=stories.jsonl wikitext=wikitext.jsonl

DIR holds a folder per task, as for `dlm evaluate`. Models are workdirs of `dlm train`. Each part is kept under --work,
so that the same command continues after an interruption. It writes docs/figures/real_model.png and
benchmarks/results/real_model.json, and prints the tables of docs/results/real_model.md.
"""

import argparse
import json
import math
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable

import harness

from dlm_jax import DiffusionLM
from dlm_jax.cli.main import main as dlm
from dlm_jax.evaluation.report import table
from dlm_jax.sampling import SamplerConfig
from dlm_jax.storage import write_json
from dlm_jax.training import read_records

PARENT = "the parent"
TASKS = ("hellaswag", "piqa", "winogrande", "lambada_openai")
PROMPTS = ("Once upon a time, there was", "The city of Paris is known for", "def add(a, b):")
COLORS = ("#1b6ca8", "#d1495b", "#edae49", "#00798c")


def evaluate(out: pathlib.Path, *arguments: str) -> dict:
    """Runs `dlm evaluate` unless its result exists, and returns it."""
    if not out.exists() and (code := dlm(["evaluate", *arguments])):
        sys.exit(code)
    return json.loads(out.read_text())


def bounds(name: str, source: str, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Returns nats per token of each held-out file, with the error of the bound's estimate."""
    found = {}
    for text, file in args.heldout.items():
        out = args.work / f"bound-{name}-{text}.json".replace(" ", "_")
        kind = "autoregressive" if name == PARENT else "diffusion"
        result = evaluate(out, f"--model={source}", f"--objective={kind}", f"--json={out}", "--data", file,
                          f"--length={args.length}", f"--num_rows={args.rows}", f"--dtype={args.dtype}",
                          *([] if name == PARENT else ["--num_masks=16"]))
        found[text] = {key: result[key] for key in ("nats_per_token", "standard_error", "num_tokens")}
    return found


def tokens_per_byte(args: argparse.Namespace) -> dict[str, float]:
    """Returns the parent's tokens per byte of each held-out file."""
    tokenizer, found = DiffusionLM.from_pretrained(args.parent).tokenizer, {}
    for name, file in args.heldout.items():
        texts = [json.loads(line)["text"] for line in pathlib.Path(file).read_text(encoding="utf-8").splitlines()]
        found[name] = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts) / sum(
            len(text.encode()) for text in texts)
    return found


def tasks(name: str, source: str, args: argparse.Namespace) -> dict:
    """Returns the results of all tasks for a model and the parent, under their names here."""
    summary = {}
    for task in TASKS:
        out = args.work / f"{task}-{name}.json".replace(" ", "_")
        result = evaluate(out, f"--model={source}", f"--parent={args.parent}", f"--tasks={task}", f"--out={out}",
                          f"--limit={args.limit}", f"--data_dir={args.data_dir}", "--batch_size=32",
                          f"--dtype={args.dtype}")
        summary |= result["tasks"]
    names = (name, PARENT)
    for found in summary.values():
        for metric in found["metrics"].values():
            metric["models"] = dict(zip(names, metric["models"].values(), strict=True))
        found["costs"] = dict(zip(names, found["costs"].values(), strict=True))
    return summary


def samplers(lm: DiffusionLM, temperature: float) -> dict[str, SamplerConfig]:
    """Returns the ways in which a model's speed is measured."""
    if lm.pretrained.diffusion.mask_token_id is None:
        return {"left to right": SamplerConfig("autoregressive", temperature=temperature)}
    if lm.diffusion.blocks is None:
        return {"64 steps": SamplerConfig("confidence", 64, temperature=temperature)}
    return {f"threshold {threshold}": SamplerConfig("threshold", threshold=threshold, temperature=temperature)
            for threshold in (0.9, 0.5)}


def speeds(source: str, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Returns tokens per second and forward passes per text, one row and eight rows at a time."""
    lm, found = DiffusionLM.from_pretrained(source, dtype=args.dtype), {}
    for way, config in samplers(lm, args.temperature).items():
        for rows in (1, 8):
            sampled = harness.sample_texts(lm, config, args.length, rows, rows, seed=0)
            found[f"{way}, {rows} rows"] = {key: sampled[key] for key in ("tokens_per_second", "forwards")}
    return found


def memory(source: str, args: argparse.Namespace) -> float:
    """Returns the most memory in GiB of a process that writes one text."""
    policy = ["--policy=autoregressive"] if source == args.parent else []
    command = [sys.executable, "-m", "dlm_jax.cli.main", "sample", f"--model={source}", f"--prompt={PROMPTS[0]}",
               "--max_new_tokens=48", f"--dtype={args.dtype}", *policy]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)} failed")
    return usage.ru_maxrss / 2**20


def texts(source: str, args: argparse.Namespace) -> dict[str, list[str]]:
    """Returns continuations of the fixed prompts, by three or four checkpoints of a workdir."""
    steps = sorted(int(path.name) for path in (pathlib.Path(source) / "checkpoints").glob("*") if path.name.isdecimal())
    found, steps = {}, steps[:: -(len(steps) // 3) or -1][::-1]  # three or four of them, the last included
    for step in steps or [None]:
        lm = DiffusionLM.from_pretrained(source if step is None else f"{source}@{step}", dtype=args.dtype)
        policy = None if lm.pretrained.diffusion.mask_token_id is not None else "autoregressive"
        found[str(step or "")] = lm.generate(PROMPTS, max_new_tokens=48, policy=policy, temperature=args.temperature)
    return found


def cached(path: pathlib.Path, make: Callable[[], object]) -> object:
    """Returns what a file holds, or makes it and writes it there."""
    if not path.exists():
        write_json(path, make())
    return json.loads(path.read_text())


def plot(results: dict[str, dict], args: argparse.Namespace) -> None:
    """Plots held-out bounds over tokens, and at the end by kind of text, with the parent's values."""
    with harness.figure(harness.FIGURES / "real_model.png", 2, (11, 4.2)) as (curves, bars):
        for (name, workdir), color in zip(args.models.items(), COLORS, strict=False):
            run = json.loads((pathlib.Path(workdir) / "config.json").read_text())
            per_step = run["data.batch_size"] * run["data.length"] / 1e6
            records = read_records(pathlib.Path(workdir), "validation")
            curves.plot([record["step"] * per_step for record in records], [record["bound"] for record in records],
                        color=color, marker="o", markersize=3, label=name)
        names = [PARENT, *args.models]
        for number, (name, color) in enumerate(zip(names, ("#222222", *COLORS), strict=False)):
            values = [found["nats_per_token"] for found in results[name]["bounds"].values()]
            bars.bar([place + number * 0.8 / len(names) for place in range(len(values))], values, 0.8 / len(names),
                     color=color, label=name)
        curves.set(xlabel="tokens (millions)", ylabel="held-out bound, nats per token", ylim=(0, None))
        curves.legend(frameon=False)
        bars.set_xticks([place + 0.4 - 0.4 / len(names) for place in range(len(args.heldout))], list(args.heldout))
        bars.set(ylabel="nats per token (bounds for diffusion)")
        bars.legend(frameon=False)


def named(items: list[str]) -> dict[str, str]:
    """Reads NAME=VALUE arguments."""
    return dict(item.split("=", 1) for item in items)


def main() -> None:
    parser = harness.parser(__doc__, limit=100, length=128, rows=64, temperature=0.7)
    parser.add_argument("--parent", required=True, help="a directory, a hub id or a GGUF file")
    parser.add_argument("--models", nargs="+", required=True, metavar="NAME=WORKDIR")
    parser.add_argument("--heldout", nargs="+", required=True, metavar="NAME=FILE")
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--work", type=pathlib.Path, required=True, help="where the parts of the result are kept")
    parser.add_argument("--dtype", default="auto", help="default %(default)s")
    args = parser.parse_args()
    args.models, args.heldout = named(args.models), named(args.heldout)
    args.work.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict] = {}
    for name, source in {PARENT: args.parent, **args.models}.items():
        results[name] = {"bounds": bounds(name, source, args)}
        for part, measure in {"speeds": speeds, "memory": memory, "texts": texts}.items():
            out = args.work / f"{part}-{name}.json".replace(" ", "_")
            results[name][part] = cached(out, lambda measure=measure, source=source: measure(source, args))
    rates = tokens_per_byte(args)
    for found in results.values():
        for text, bound in found["bounds"].items():
            bound["bits_per_byte"] = bound["nats_per_token"] * rates[text] / math.log(2)
    plot(results, args)
    for name, source in args.models.items():
        results[name]["tasks"] = tasks(name, source, args)
    print(harness.table_head("nats per token (bits per byte)", *args.heldout))
    for name, found in results.items():
        print(harness.row(name, *(f"{one['nats_per_token']:.3f}" + (
            f" ± {one['standard_error']:.3f}" if one["standard_error"] else "") + f" ({one['bits_per_byte']:.3f})"
            for one in found["bounds"].values())))
    for name in args.models:
        print("\n" + table({"models": [name, PARENT], "tasks": results[name]["tasks"], "groups": {}}, markdown=True))
    print("\n" + harness.table_head("model", "GiB", "way", "tokens per second", "forward passes per text"))
    for name, found in results.items():
        for way, speed in found["speeds"].items():
            print(harness.row(name, f"{found['memory']:.2f}", way, f"{speed['tokens_per_second']:.1f}",
                              f"{speed['forwards']:.0f}"))
    for name, found in results.items():
        for step, continued in found["texts"].items():
            print(f"\n{name} {step}\n" + "\n".join(f"  {text!r}" for text in continued))
    settings = harness.settings(args, "parent", "models", "heldout", "data_dir", "work")
    harness.write_results("real_model", {"settings": settings, "models": results}, "jax")


if __name__ == "__main__":
    main()
