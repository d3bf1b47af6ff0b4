"""Every task of `dlm evaluate` that local data allows, a diffusion model beside its parent: the table of docs/tasks.md.

    python benchmarks/tasks.py --model=runs/stories --parent=assets/stories-gpt2 --data_dir=DIR --out=runs/tasks

DIR holds a folder a task. Tasks without data are left out and named. Programs and gaps of unknown length take many
forward passes an item, so that fewer of their items are taken. A command that was stopped goes on. Each task's records
and pages go to --out; the table to docs/tasks.md and benchmarks/results/tasks.json.
"""

import argparse
import json
import pathlib
import sys

import harness
import jax

from dlm_jax.cli.main import main as dlm
from dlm_jax.errors import DataError
from dlm_jax.evaluation.report import EXPLANATION, table
from dlm_jax.evaluation.tasks import TASKS, find_file

PAGE = harness.ROOT / "docs" / "tasks.md"
DEAR = {"rocstories": 5, "humaneval_infilling": 15}  # by how much fewer items are taken
OWN_TEXT = ("text", "reconstruction", "generation")
HEAD = """# The shipped small model on every task

`python benchmarks/tasks.py` writes this page: the quickstart's recipe run for 4,000 steps (2.6 million parameters in
four layers, which have read nothing but children's stories) beside the autoregressive model it was made of. Most tasks
are far beyond both, and are here to show that every part works and that errors are honest: where neither knows
anything, multiple choice is at chance and most intervals of a difference hold 0. The plain text is held-out
stories that the parent itself wrote, so that its figures there are as good as any model's can be.

"""


def evaluate(names: list[str], out: pathlib.Path, limit: int, args: argparse.Namespace) -> dict:
    """One call of `dlm evaluate`."""
    if not out.exists():
        files = [f"{name}={args.text}" for name in names if name in OWN_TEXT]
        code = dlm(["evaluate", f"--model={args.model}", f"--parent={args.parent}", f"--tasks={','.join(names)}",
                    f"--data_dir={args.data_dir}", f"--limit={limit}", f"--num_steps={args.num_steps}", f"--out={out}",
                    "--batch_size=32", *(["--data_files", *files] if files else []),
                    *(["--allow_code_execution"] if "humaneval_infilling" in names else [])])
        if code:
            sys.exit(code)
    return json.loads(out.read_text())


def main() -> None:
    parser = harness.parser(__doc__, limit=300, num_steps=32)
    parser.add_argument("--model", required=True, help="a diffusion model")
    parser.add_argument("--parent", required=True, help="the autoregressive model it was made of")
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="a folder for what each task leaves")
    parser.add_argument("--text", default="assets/stories/heldout.jsonl", help="for tasks on plain text")
    args = parser.parse_args()
    there, missing = [], []
    for name, task in TASKS.items():
        try:
            if name not in OWN_TEXT:
                find_file(task, args.data_dir)
            there.append(name)
        except DataError:
            missing.append(name)
    args.out.mkdir(parents=True, exist_ok=True)
    tasks, data = {}, []
    for name in there:
        limit = max(args.limit // DEAR.get(name, 1), 1)
        result = evaluate([name], args.out / f"{name}.json", limit, args)
        tasks |= result["tasks"]
        data += [{"task": name, "file": pathlib.Path(about["file"]).name, "sha256": about["sha256"]}
                 for about in result["settings"]["data"]]
    names = ["diffusion", "parent"]
    for found in tasks.values():
        found["models"] = dict(zip(names, found["models"].values(), strict=True))
    page = (f"{HEAD}{table(tasks, names, markdown=True)}\n\n{EXPLANATION} {args.num_steps} forward passes of writing. "
            f"Without local data: {', '.join(missing) or 'none'}.\n")
    PAGE.write_text(page)
    harness.write_json("tasks", {
        "settings": {name: getattr(args, name) for name in ("limit", "num_steps")} | {"fewer": DEAR}, "data": data,
        "versions": result["versions"], "device": jax.devices()[0].device_kind, "tasks": tasks})
    print(page)


if __name__ == "__main__":
    main()
