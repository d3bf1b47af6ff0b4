"""Makes the tables of docs/results/plans.md, recipes of the paper on TPU slices and GPUs, by `dlm plan` without a TPU.

    python benchmarks/plans.py              makes the plans missing in benchmarks/results/plans.json, minutes each
    python benchmarks/plans.py --one        makes the next of them; exit status 1 if none is missing
    python benchmarks/plans.py --table      prints the tables of the results
"""

import json
import pathlib
import sys
import tempfile

import harness

from dlm_jax.cli.main import main as dlm

ACCUMULATE = "--config.optimizer.accumulate_steps"

# Recipe, devices, settings: first those that fit, then those that do not without changes.
TPU = [
    ("diffugpt_s", "v5e:2x2", ()), ("diffugpt_s", "v5e:4x4", ()), ("diffugpt_s", "v4:2x2x1", ()),
    ("diffugpt_s", "v5p:2x2x1", ()), ("diffugpt_s", "v6e:2x2", ()), ("diffugpt_s", "v6e:2x4", ()),
    ("diffugpt_m", "v5e:4x4", (f"{ACCUMULATE}=10",)), ("diffugpt_m", "v4:2x2x4", (f"{ACCUMULATE}=5",)),
    ("diffugpt_m", "v5p:2x2x2", (f"{ACCUMULATE}=4",)), ("diffugpt_m", "v6e:4x4", (f"{ACCUMULATE}=5",)),
    ("diffullama_7b", "v5e:16x16", ()), ("diffullama_7b", "v5p:4x4x4", ()),
    ("diffullama_7b", "v4:4x4x4", (f"{ACCUMULATE}=8",)), ("diffullama_7b", "v6e:8x8", (f"{ACCUMULATE}=8",)),
    ("diffullama_7b", "v5e:2x4", ("--suggest",)), ("diffullama_7b", "v4:2x2x1", ("--suggest",)),
    ("diffugpt_s", "v5e:1x1", ("--suggest",)), ("diffugpt_m", "v5e:2x2", ("--suggest",)),
    ("diffullama_7b", "v5e:4x8", ("--suggest",)), ("diffullama_7b", "v6e:4x4", ("--suggest",)),
    ("sft_gsm8k_llama_lora", "v5e:2x4", ()), ("block_llama_7b", "v5e:16x16", ()),
]
GPU = [
    ("diffugpt_s", "a100-80:8", ()), ("diffugpt_s", "h100:8", ()),
    ("diffugpt_m", "a100-80:8", ("--suggest",)), ("diffugpt_m", "h100:8", ("--suggest",)),
    ("diffullama_7b", "h100:8", ("--suggest",)), ("diffullama_7b", "a100-80:8", ("--suggest",)),
    ("diffullama_7b", "a100-80:64", ()), ("diffullama_7b", "gh200:64", ()),
]


def key(recipe: str, devices: str, settings: tuple[str, ...]) -> str:
    kind = "--gpu" if (recipe, devices, settings) in GPU else "--topology"
    return " ".join(("dlm plan", f"--config={recipe}", f"{kind}={devices}", *settings))


def plan(command: str) -> dict:
    """Returns the JSON of a command."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        code = dlm([*command.split()[1:], f"--json={file.name}"])
        if code not in (0, 3):
            sys.exit(code)
        return json.loads(pathlib.Path(file.name).read_text())


def known() -> dict[str, dict]:
    return harness.read_json("plans", {})


def row(result: dict) -> str:
    """Returns a row of a table."""
    entry = result["plans"][0]
    plan, memory, time = entry["plan"], entry["plan"]["memory"], entry["plan"]["time"]
    batch, length, micro_batches = (result["config"][key] for key in (
        "data.batch_size", "data.length", "optimizer.accumulate_steps"))
    cells = [f"`{plan['target']}`", f"{batch} x {length}" + f" in {micro_batches}" * (micro_batches > 1),
             f"{memory['needed']:.2f} of {memory['limit']:g}", "yes" if memory["fits"] else "**no**"]
    if time is None:
        return harness.row(*cells, "", "", "", "", "", _trials(entry))
    sent = "" if plan["sent"] is None else f"{sum(kind['bytes'] for kind in plan['sent'].values()) / 1e9:.1f}"
    utilization = time.get("utilization", time.get("utilisation"))  # utilisation, advice: older results
    return harness.row(*cells, sent, f"{time['floor']:.3g}", f"{time['seconds']:.3g}", f"{utilization:.0%}",
                       f"{time['days']:.1f} / {time['chip_hours']:,.0f}", _trials(entry))


def _trials(entry: dict) -> str:
    trials = entry.get("suggestions", entry.get("advice", []))
    said = [f"`{' '.join(f'{key}={value}' for key, value in trial['settings'].items())}`: "
            + (f"{trial['memory']['needed']:.2f}, fits, about {_seconds(trial['seconds'])}" if trial["memory"]["fits"]
               else f"{trial['memory']['needed']:.1f}, no")
            for trial in trials]
    least = entry["plan"]["least_chips"]
    if least > entry["plan"]["num_chips"]:
        said.insert(0, f"state and gradients fill {least} chips")
    return "; ".join(said)


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds < 1000 else f"{seconds:,.0f} s"


def tables() -> str:
    heads = ["devices", "batch", "GiB per chip", "fits", "sent, GB", "at least, s", "about, s",
             "utilization", "days / chip-hours", "other settings tried"]
    lines, results = [], known()
    for name, cases in (("TPU slices, compiled", TPU), ("GPUs, estimated", GPU)):
        for recipe in dict.fromkeys(case[0] for case in cases):
            done = [results[key(*case)] for case in cases if case[0] == recipe and key(*case) in results]
            if done:
                lines += ["", f"**{recipe}, {name}**", "", harness.table_head(*heads),
                          *map(row, done)]
    return "\n".join(lines)


def main() -> int:
    parser = harness.parser(__doc__)
    parser.add_argument("--one", action="store_true")
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    if arguments.table:
        print(tables())
        return 0
    waiting = [command for command in (key(*case) for case in GPU + TPU) if command not in known()]
    for command in waiting[:1] if arguments.one else waiting:
        print(command, flush=True)
        result = plan(command)
        harness.write_json("plans", known() | {command: result})
    return 0 if waiting else 1


if __name__ == "__main__":
    sys.exit(main())
