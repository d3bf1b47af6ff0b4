"""Prints the measurements of reproduce_paper.sh next to the paper's table.

  paper_table.py DIRECTORY NAME...
"""

import json
import pathlib
import sys
from typing import Any

# Table 1 of arXiv 2410.17891 in percent: (model, parent).
PAPER: dict[str, dict[tuple[str, str], tuple[float, float]]] = {
    "diffugpt-s": {
        ("triviaqa", "contains"): (2.0, 4.0), ("lambada_openai", "last word"): (21.6, 25.9),
        ("hellaswag", "acc"): (33.4, 29.9), ("winogrande", "acc"): (50.8, 48.5),
        ("social_iqa", "acc"): (37.0, 35.7), ("piqa", "acc"): (57.7, 62.1), ("rocstories", "rouge1"): (13.7, 7.8),
        ("rocstories", "rouge2"): (1.4, 0.8), ("rocstories", "rougeL"): (12.6, 7.4),
        ("humaneval_fim_single_line", "pass@1"): (0.3, 1.6)},
    "diffugpt-m": {
        ("triviaqa", "contains"): (3.8, 6.7), ("lambada_openai", "last word"): (30.3, 37.7),
        ("hellaswag", "acc"): (37.2, 38.3), ("winogrande", "acc"): (52.6, 50.7),
        ("social_iqa", "acc"): (39.0, 37.7), ("piqa", "acc"): (59.6, 67.4), ("rocstories", "rouge1"): (18.7, 8.6),
        ("rocstories", "rouge2"): (2.7, 0.9), ("rocstories", "rougeL"): (17.0, 8.2),
        ("humaneval_fim_single_line", "pass@1"): (2.9, 2.6)},
    "diffullama": {
        ("triviaqa", "contains"): (18.5, 45.4), ("lambada_openai", "last word"): (53.9, 68.8),
        ("hellaswag", "acc"): (58.7, 74.9), ("winogrande", "acc"): (56.4, 67.1),
        ("social_iqa", "acc"): (43.2, 44.8), ("piqa", "acc"): (63.3, 78.3), ("rocstories", "rouge1"): (23.3, 11.6),
        ("rocstories", "rouge2"): (5.5, 2.1), ("rocstories", "rougeL"): (21.2, 10.5),
        ("humaneval_fim_single_line", "pass@1"): (15.5, 1.7)},
}
# What lm-eval measures instead.
OURS = {("triviaqa", "contains"): "exact_match, remove_whitespace", ("lambada_openai", "last word"): "acc"}


def scores(folder: pathlib.Path, name: str) -> list[str]:
    """Returns a table of the measured tasks: paper, the paper's task, lm-eval's; the model, then its parent."""
    found = {protocol: json.loads((folder / f"{name}.{protocol}.json").read_text())
             for protocol in ("reference", "default")}
    lines = [f"## {name}", "", "| task | metric | items | paper | the paper's task | lm-eval's | parent: paper | "
             "the paper's task | lm-eval's |", "|" + " --- |" * 9]
    for (task, metric), paper in PAPER[name].items():
        if task in found["default"]["tasks"]:
            measured = [cell(found[protocol], task, metric, protocol, which)
                        for which in (0, 1) for protocol in ("reference", "default")]
            items = found["default"]["tasks"][task]["items"]
            lines.append(f"| {task} | {metric.replace('_', ' ')} | {items} | {paper[0]} | {measured[0]} | {measured[1]}"
                         f" | {paper[1]} | {measured[2]} | {measured[3]} |")
    return [*lines, ""]


def cell(result: dict[str, Any], task: str, metric: str, protocol: str, which: int) -> str:
    """Returns a mean with its standard error, in percent."""
    if protocol == "reference":
        task = f"diffullama_{task.removesuffix('_openai')}"
        metric = "stripped_match" if metric == "last word" else metric
    else:
        metric = OURS.get((task, metric), metric)
    mean = result["tasks"][task]["metrics"][metric]["models"][result["models"][which]]
    error = "" if mean["standard_error"] is None else f" ± {100 * mean['standard_error']:.1f}"
    return f"{100 * mean['mean']:.1f}{error}"


def likelihoods(folder: pathlib.Path, names: list[str]) -> list[str]:
    """Returns a table of the likelihood of the text and of the logits, where they were measured."""
    lines = []
    for name in names:
        own, parent, parity = (folder / f"{name}{end}.json" for end in (".text", ".text.parent", ".parity"))
        if not own.exists() and not parity.exists():
            continue
        cells = ["not measured", "not measured", "not compared"]
        if own.exists():
            own, parent = json.loads(own.read_text()), json.loads(parent.read_text())
            cells[:2] = (f"{own['nats_per_token']:.4f} ± {own['standard_error']:.4f}",
                         f"{parent['nats_per_token']:.4f}")
        if parity.exists():
            cells[2] = f"{json.loads(parity.read_text())['max_difference']:.1e} at most"
        lines.append(f"| {name} | {' | '.join(cells)} |")
    head = ["| model | nats per token, at most | its parent, exact | log-probabilities, ours - reference |",
            "| --- | --- | --- | --- |"]
    return [*head, *lines, ""] if lines else []


def main(directory: str, *names: str) -> None:
    """Prints the tables and writes them to DIRECTORY/table.md."""
    folder = pathlib.Path(directory)
    lines = likelihoods(folder, list(names))
    for name in names:
        lines += scores(folder, name)
    text = "\n".join(lines).rstrip()
    (folder / "table.md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main(*sys.argv[1:])
