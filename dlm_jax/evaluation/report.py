"""From records to a table: each model's means with their errors, and the paired difference from its parent."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from dlm_jax.evaluation.generation import varied
from dlm_jax.evaluation.run import Record, written
from dlm_jax.evaluation.statistics import Difference, Mean, mean_of, paired_difference, ratio_of

PLAIN = ("nats_per_token", "bits_per_byte", "generative_perplexity", "words")  # all others are shares
EXPLANATION = (
    "Shares in percent, ± the standard error over items, or where all are alike with the 95 % limit; differences are "
    "item by item, with the 95 % interval of a bootstrap over items. Of nats, bits and perplexities the smaller is the "
    "better, and a diffusion model's nats and bits are upper bounds.")


def summarise(records: Sequence[Record], tasks: Sequence[str], models: Sequence[str], seed: int = 0) -> dict[str, Any]:
    """For each task its metrics: {task: {"items", "models": {name: {metric: mean}}, "differences": {metric: ...}}}.

    Means have the standard error over items; differences are of the first model minus the second, item by item.
    """
    result = {}
    for task in tasks:
        asked = {name: [record for record in records if record["task"] == task and record["model"] == name]
                 for name in models}
        of_model = {name: [record["values"] for record in found] for name, found in asked.items()}
        means = {name: _means(of_model[name], found) for name, found in asked.items()}
        result[task] = {"items": len(of_model[models[0]]),
                        "models": {name: {metric: dataclasses.asdict(mean) for metric, mean in found.items()}
                                   for name, found in means.items()}}
        if len(models) > 1:
            first, second = (_vectors(of_model[name]) for name in models[:2])
            result[task]["differences"] = {
                metric: dataclasses.asdict(paired_difference(first[metric], second[metric], seed))
                for metric in first if metric in second}
    return result


def cells(summary: dict[str, Any], models: Sequence[str]) -> list[list[str]]:
    """The head, and one row a task and metric; shares in percent, with their standard errors."""
    head = ["task", "metric", "items", *models]
    head += [f"{models[0]} - {models[1]} (95 %)"] if len(models) > 1 else []
    rows = [head]
    for task, found in summary.items():
        for metric in found["models"][models[0]]:
            scale = 1 if metric in PLAIN else 100
            row = [task, metric.replace("_", " "), str(found["items"])]
            row += [_mean(Mean(**found["models"][name][metric]), scale) for name in models]
            if len(models) > 1:
                difference = found["differences"].get(metric)
                row.append(_difference(Difference(**difference), scale) if difference else "-")
            rows.append(row)
    return rows


def table(summary: dict[str, Any], models: Sequence[str], *, markdown: bool = False) -> str:
    """`cells` in columns, or as Markdown."""
    rows = cells(summary, models)
    if markdown:
        lines = [f"| {' | '.join(row)} |" for row in rows]
        return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
                     for row in rows)


def markdown_report(result: dict[str, Any]) -> str:
    """The table with what it takes to have it again."""
    settings = "\n".join(f"- {name}: {value}" for name, value in shown_settings(result["settings"]))
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return (f"# Evaluation of {result['models'][0]}\n\n"
            f"{table(result['tasks'], result['models'], markdown=True)}\n\n"
            f"{EXPLANATION}\n\n## Settings\n\n{settings}\n- versions: {versions}\n")


def shown_settings(settings: dict[str, Any]) -> list[tuple[str, str]]:
    """Settings for people: those that are set, the data a line each."""
    pairs = [(name, str(value)) for name, value in settings.items() if name != "data" and value is not None]
    for about in settings.get("data", ()):
        about = dict(about)
        pairs.append((f"data of {about.pop('task')}", ", ".join(map(str, about.values()))))
    return pairs


def _means(values: Sequence[dict[str, float]], records: Sequence[Record]) -> dict[str, Mean]:
    columns = _columns(values)
    if "judged_nats" in columns:
        return _of_writing(columns, [text for record in records for text in written(record)])
    if "nats" not in columns:
        return {name: mean_of(column) for name, column in columns.items()}
    return {"nats_per_token": ratio_of(columns["nats"], columns["tokens"]),
            "bits_per_byte": ratio_of(columns["nats"] / math.log(2), columns["bytes"])}


def _of_writing(columns: dict[str, np.ndarray], texts: Sequence[str]) -> dict[str, Mean]:
    """Of free writing: perplexity under the judge, its error by linearisation; distinct-n has none."""
    means = {}
    if columns["judged_tokens"].any():
        nats = ratio_of(columns["judged_nats"], columns["judged_tokens"])
        perplexity = math.exp(nats.mean)
        error = None if nats.standard_error is None else perplexity * nats.standard_error
        means["generative_perplexity"] = Mean(perplexity, error, nats.count)
    shares = {name: Mean(value, None, len(texts)) for name, value in varied(texts).items()}
    return means | shares | {"words": mean_of(columns["words"])}


def _vectors(values: Sequence[dict[str, float]]) -> dict[str, np.ndarray]:
    """What may be compared item by item: of texts the bits a byte, which do not depend on the tokenizer."""
    columns = _columns(values)
    if "judged_nats" in columns:
        return {}
    if "nats" not in columns:
        return columns
    return {"bits_per_byte": columns["nats"] / math.log(2) / columns["bytes"].mean()}


def _columns(values: Sequence[dict[str, float]]) -> dict[str, np.ndarray]:
    return {name: np.array([value[name] for value in values], np.float64) for name in values[0]}


def _mean(mean: Mean, scale: float) -> str:
    digits = 1 if scale == 100 else 3
    error = "" if mean.standard_error is None else f" ± {scale * mean.standard_error:.{digits}f}"
    if scale == 100 and mean.standard_error == 0 and mean.mean in (0, 1):  # all alike: a spread of 0 says nothing
        reach = 100 * (1 - 0.05 ** (1 / mean.count))  # the exact 95 % limit of a share, about 3 / n
        error = f" (< {reach:.1f})" if mean.mean == 0 else f" (> {100 - reach:.1f})"
    return f"{scale * mean.mean:.{digits}f}{error}"


def _difference(found: Difference, scale: float) -> str:
    digits = 1 if scale == 100 else 3
    mean, low, high = (scale * value for value in (found.mean, found.low, found.high))
    return f"{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"
