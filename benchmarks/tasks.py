"""Evaluates a diffusion model and its parent on tasks of all kinds, and writes docs/results/tasks.md.

    python benchmarks/tasks.py --model=quickstart/export --parent=assets/stories-gpt2 --data_dir=DIR --out=runs/tasks

DIR holds a folder per task. Programs and gaps of unknown length take many forward passes per item, so fewer of their
items are used. If it is stopped, the same command resumes. The records and table of each task go to --out, the table to
docs/results/tasks.md and benchmarks/results/tasks.json.
"""

import argparse
import json
import pathlib
import sys
import textwrap

import harness
import jax

from dlm_jax.cli.main import main as dlm
from dlm_jax.evaluation.report import EXPLANATION, table

PAGE = harness.ROOT / "docs" / "results" / "tasks.md"
TASKS = ("hellaswag", "winogrande", "piqa", "social_iqa", "lambada_openai", "triviaqa", "gsm8k", "gsm8k_icot",
         "rocstories", "humaneval_fim_single_line", "text", "reconstruction", "generation")
REDUCTION = {"gsm8k": 5, "gsm8k_icot": 5, "rocstories": 5, "humaneval_fim_single_line": 15}  # divides the items
GENERATES = ("triviaqa", "gsm8k", "gsm8k_icot", "rocstories", "humaneval_fim_single_line", "generation")
OWN_TEXT = ("text", "reconstruction", "generation")
HEAD = """# The shipped small model on every task

`python benchmarks/tasks.py` writes this page. It compares what `launch/quickstart.sh` makes in a few minutes (2.6
million parameters in four layers, trained on nothing but children's stories), with the autoregressive model from which
it was adapted. Most tasks are far too hard for both; they show that every task runs and that errors are honest. Where
neither model knows anything, multiple choice is at chance and most intervals of a difference contain 0. The plain text
is held-out stories that the parent itself generated, so its results there are as good as any model's can be. Other
programs may have used the machine: seconds are of this run alone.

"""


def evaluate(names: list[str], out: pathlib.Path, limit: int, args: argparse.Namespace) -> dict:
    """Runs `dlm evaluate`, and returns its JSON."""
    if not out.exists():
        files = [f"{name}={args.text}" for name in names if name in OWN_TEXT]
        code = dlm(["evaluate", f"--model={args.model}", f"--parent={args.parent}", f"--tasks={','.join(names)}",
                    f"--data_dir={args.data_dir}", f"--limit={limit}", f"--out={out}", "--batch_size=32",
                    *([f"--num_steps={args.num_steps}"] if names[0] in GENERATES else []),
                    *(["--num_fewshot=0"] if names[0] == "gsm8k" else []), *(["--data_files", *files] if files else []),
                    *(["--allow_code_execution"] if "humaneval_fim_single_line" in names else [])])
        if code:
            sys.exit(code)
    return json.loads(out.read_text())


def main() -> None:
    parser = harness.parser(__doc__, limit=300, num_steps=32)
    parser.add_argument("--model", required=True, help="a diffusion model")
    parser.add_argument("--parent", required=True, help="the autoregressive model it was adapted from")
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="a folder for the results of each task")
    parser.add_argument("--text", default="assets/stories-text/heldout.jsonl", help="for tasks on plain text")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    tasks, data, shortened = {}, [], {}
    for name in TASKS:
        limit = max(args.limit // REDUCTION.get(name, 1), 1)
        result = evaluate([name], args.out / f"{name}.json", limit, args)
        tasks |= result["tasks"]
        shortened |= result["shortened"]
        data += [{"task": name, "file": pathlib.Path(about["file"]).name, "sha256": about["sha256"]}
                 for about in result["settings"]["data"]]
    names = ["diffusion", "parent"]
    for found in tasks.values():
        for metric in found["metrics"].values():
            metric["models"] = dict(zip(names, metric["models"].values(), strict=True))
        found["costs"] = dict(zip(names, found["costs"].values(), strict=True))
    notes = f"{EXPLANATION} A generated text takes {args.num_steps} forward passes."
    shown = table({"models": names, "tasks": tasks, "groups": {}, "shortened": shortened}, markdown=True)
    page = f"{HEAD}{shown}\n\n{textwrap.fill(notes, 120)}\n"
    PAGE.write_text(page)
    harness.write_json("tasks", {
        "settings": {name: getattr(args, name) for name in ("limit", "num_steps")} | {"fewer": REDUCTION}, "data": data,
        "versions": result["versions"], "device": jax.devices()[0].device_kind, "tasks": tasks})
    print(page)


if __name__ == "__main__":
    main()
