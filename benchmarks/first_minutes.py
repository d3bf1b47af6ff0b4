"""The time of a new user's first commands, each a process of its own: help, a wrong path, and a first sample.

    python benchmarks/first_minutes.py

`dlm sample` of the model under assets/ runs with an empty cache of compiled programs (cold), and then with what that
run has kept (warm). Python's start is measured beside them. The commands take turns, so that other load on the machine
affects all of them. Prints a table of seconds, and writes benchmarks/results/first_minutes.json.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import harness

DLM = (sys.executable, "-m", "dlm_jax.cli.main")
SAMPLE = (*DLM, "sample", f"--model={harness.ROOT / 'assets' / 'stories-gpt2'}", "--prompt=Once upon a time")
COMMANDS = {  # name: command, exit status, the most seconds it should take
    "Python alone": ((sys.executable, "-c", "pass"), 0, None),
    "dlm --help": ((*DLM, "--help"), 0, 0.3),
    "dlm sample --help": ((*DLM, "sample", "--help"), 0, 0.3),
    "dlm sample, a wrong path": ((*DLM, "sample", "--model=/no/such"), 1, 1.0),
    "dlm train, a wrong path": ((*DLM, "train", "--config=quickstart", "--workdir=unused",
                                 "--config.model.source=/no/such"), 1, 1.0),
    "dlm sample, from left to right, cold": ((*SAMPLE, "--policy=autoregressive"), 0, 8.0),
    "dlm sample, from left to right, warm": ((*SAMPLE, "--policy=autoregressive"), 0, 4.0),
    "dlm sample, by denoising, cold": ((*SAMPLE, "--mask_token=<|mask|>"), 0, 8.0),
    "dlm sample, by denoising, warm": ((*SAMPLE, "--mask_token=<|mask|>"), 0, 4.0),
}


def measure(repeats: int) -> dict[str, list[float]]:
    """Returns the seconds of each call of each command."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
        environment |= {"XDG_CACHE_HOME": cache, "PYTHONPATH": str(harness.ROOT)}

        def run(name: str) -> None:
            command, status, _ = COMMANDS[name]
            if name.endswith("cold"):
                shutil.rmtree(os.path.join(cache, "dlm_jax"), ignore_errors=True)
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            if done.returncode != status:
                raise SystemExit(f"{' '.join(command)} ended with {done.returncode}: {done.stderr}")

        seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
        run("dlm sample, by denoising, cold")  # reads all files from the disk once
        for _ in range(repeats):
            for name in COMMANDS:
                started = time.perf_counter()
                run(name)
                seconds[name].append(time.perf_counter() - started)
    return seconds


def main() -> None:
    args: argparse.Namespace = harness.parser(__doc__, repeats=5).parse_args()
    seconds = measure(args.repeats)
    results = {name: {"median": statistics.median(values), "least": min(values), "at_most": COMMANDS[name][2],
                      "seconds": values} for name, values in seconds.items()}
    print(harness.table_head("command", "median, s", "least, s", "bar, s"))
    for name, result in results.items():
        bar = "" if result["at_most"] is None else f"{result['at_most']:.1f}"
        print(harness.row(name, f"{result['median']:.2f}", f"{result['least']:.2f}", bar))
    harness.write_results("first_minutes", {"settings": harness.settings(args), "results": results}, "transformers")


if __name__ == "__main__":
    main()
