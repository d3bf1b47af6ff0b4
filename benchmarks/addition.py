"""Whether fine-tuning and sampling work together: three-digit sums, written like GSM8K's steps, by the small model.

    python benchmarks/addition.py [--out build/addition]

writes 20,000 sums for training, `What is 468+357?||<<8+7+0=15>> <<6+5+1=12>> <<4+3+1=8>> #### 825`, and 500
of other pairs; fine-tunes by `configs/sft_addition.py`; and evaluates on the 500. It prints a table and writes
benchmarks/results/addition.json.
"""

import json
import os
import pathlib
import random
import time

import harness

from dlm_jax.cli.main import main as command_line
from dlm_jax.training.metrics import read_records

SIZES = {"train": 20_000, "validation": 200, "test": 500}


def line(a: int, b: int) -> str:
    """Returns the sum of two numbers of equal length as steps with carries, from the last digit to the first."""
    steps, carry = [], 0
    for x, y in zip(reversed(str(a)), reversed(str(b)), strict=True):
        total = int(x) + int(y) + carry
        steps.append(f"<<{x}+{y}+{carry}={total}>>")
        carry = total // 10
    return f"What is {a}+{b}?||{' '.join(steps)} #### {a + b}"


def write_data(folder: pathlib.Path, seed: int = 0) -> None:
    """Writes files of SIZES lines; no pair of numbers is in two of them."""
    source = random.Random(seed)
    pairs = [divmod(number, 900) for number in source.sample(range(900 * 900), sum(SIZES.values()))]
    lines = iter([line(100 + a, 100 + b) for a, b in pairs])
    for name, size in SIZES.items():
        (folder / f"{name}.txt").write_text("".join(next(lines) + "\n" for _ in range(size)))


def dlm(*arguments: str) -> None:
    """Runs a `dlm` command, and exits if it fails."""
    if status := command_line(list(arguments)):
        raise SystemExit(status)


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("build/addition"))
    arguments = parser.parse_args()
    out, run = arguments.out, arguments.out / "run"
    out.mkdir(parents=True, exist_ok=True)
    write_data(out)
    started = time.monotonic()
    dlm("train", "--config=sft_addition", f"--workdir={run}", f"--config.data.train={out / 'train.txt'}",
        f"--config.data.validation={out / 'validation.txt'}")
    trained = time.monotonic()
    dlm("evaluate", f"--model={run}", "--examples", str(out / "test.txt"), "--batch_size=64",
        f"--json={out / 'answers.json'}")
    answers = json.loads((out / "answers.json").read_text())
    result = {
        "minutes_training": (trained - started) / 60, "minutes_answering": (time.monotonic() - trained) / 60,
        "minutes_of_processor_time": time.process_time() / 60, "unseen_sums": answers["num_examples"],
        **answers["values"], "nats_per_token": answers["nats_per_token"],
        "while_training": [{name: value for name, value in record.items() if name != "text"}
                           for record in read_records(run, "generation")],
        "wrong": [record["text"] for record in answers["records"] if not record["values"]["strict_match"]][:10],
        "cores": os.cpu_count()}
    harness.write_results("addition", result, "jax", "flax")
    print(f"\n{'step':>6}  {'exact':>6}  {'sum':>6}  {'form':>6}")
    for record in result["while_training"]:
        print(f"{record['step']:>6}  {record['exact_match']:>6.3f}  {record['strict_match']:>6.3f}  "
              f"{record['well_formed']:>6.3f}")
    print(f"{result['unseen_sums']} unseen sums: exact {answers['values']['exact_match']['mean']:.3f}, sum "
          f"{answers['values']['strict_match']['mean']:.3f}; {result['minutes_training']:.1f} minutes of training, "
          f"{result['minutes_answering']:.1f} of answering, {result['minutes_of_processor_time']:.1f} of processor "
          "time")


if __name__ == "__main__":
    main()
