"""Reports of a run: means with standard errors, paired differences, and a table."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from dlm_jax.errors import DataError
from dlm_jax.evaluation.generation import diversity
from dlm_jax.evaluation.run import Record, generated_texts

_RESAMPLES = 10_000  # of the bootstrap
NOT_SHARES = ("nats_per_token", "bits_per_byte", "generative_perplexity", "words")  # all other metrics are shares
EXPLANATION = (
    "Shares are in percent, ± the standard error over items, or with the 95 % limit if all items are equal. "
    "Differences are paired by item, with the 95 % interval of a bootstrap over items. Smaller nats, bits and "
    "perplexities are better, and a diffusion model's nats and bits are upper bounds.")


@dataclasses.dataclass(frozen=True)
class Mean:
    """A mean over `count` items; its `standard_error` treats them as a random sample and is None for a single item."""

    mean: float
    standard_error: float | None
    count: int


@dataclasses.dataclass(frozen=True)
class Difference:
    """The mean difference of two models on the same items.

    Attributes:
      standard_error: of the differences per item, in which the difficulty of an item cancels.
      low, high: 95 % interval by bootstrap over items.
    """

    mean: float
    standard_error: float | None
    low: float
    high: float
    count: int


def mean_of(values: np.ndarray) -> Mean:
    """Returns the mean of `values` [items] and its standard error, s / sqrt(n)."""
    values = np.asarray(values, np.float64)
    if not len(values):
        raise DataError("there are no items to take a mean of")
    error = float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else None
    return Mean(float(values.mean()), error, len(values))


def ratio_of(numerator: np.ndarray, denominator: np.ndarray) -> Mean:
    """Returns the ratio of two sums over items, [items] each, with its error by linearization (nats per token)."""
    numerator, denominator = np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)
    ratio = numerator.sum() / denominator.sum()
    return dataclasses.replace(mean_of((numerator - ratio * denominator) / denominator.mean()), mean=float(ratio))


def paired_difference(values: np.ndarray, others: np.ndarray, seed: int = 0) -> Difference:
    """Returns the paired difference `values` - `others`, [items] each, with a percentile bootstrap over the items."""
    values, others = np.asarray(values, np.float64), np.asarray(others, np.float64)
    if values.shape != others.shape:
        raise DataError(f"{len(values)} and {len(others)} items cannot be compared in pairs")
    found = mean_of(values - others)
    rng = np.random.default_rng(seed)
    # In chunks, so that large tasks need little memory.
    means = [((values - others)[rng.integers(0, len(values), (_RESAMPLES // 100, len(values)))]).mean(axis=1)
             for _ in range(100)]
    low, high = np.quantile(np.concatenate(means), (0.025, 0.975))
    return Difference(found.mean, found.standard_error, float(low), float(high), found.count)


def summarize(records: Sequence[Record], tasks: Sequence[str], models: Sequence[str], seed: int = 0) -> dict[str, Any]:
    """Returns per task {"items", "models": {name: {metric: mean}}, "differences": {metric: difference}}.

    Means have the standard error over items. Differences are the first model minus the second, paired by item.
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
    """Returns the header, and one row per task and metric; shares in percent, with their standard errors."""
    names = short_names(models)
    head = ["task", "metric", "items", *names]
    head += [f"{names[0]} - {names[1]} (95 %)"] if len(models) > 1 else []
    rows = [head]
    for task, found in summary.items():
        for metric in found["models"][models[0]]:
            scale = 1 if metric in NOT_SHARES else 100
            row = [task, metric.replace("_", " "), str(found["items"])]
            row += [_mean(Mean(**found["models"][name][metric]), scale) for name in models]
            if len(models) > 1:
                difference = found["differences"].get(metric)
                row.append(_difference(Difference(**difference), scale) if difference else "-")
            rows.append(row)
    return rows


def short_names(models: Sequence[str]) -> list[str]:
    """Returns the models' names without their directories, unless two would be called the same."""
    short = [name.rstrip("/").rpartition("/")[2] for name in models]
    return short if len(set(short)) == len(models) else list(models)


def table(summary: dict[str, Any], models: Sequence[str], *, markdown: bool = False) -> str:
    """Returns `cells` as aligned columns, or as Markdown."""
    rows = cells(summary, models)
    if markdown:
        lines = [f"| {' | '.join(row)} |" for row in rows]
        return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
                     for row in rows)


def markdown_report(result: dict[str, Any]) -> str:
    """Returns the table as Markdown, with the settings that reproduce it."""
    settings = "\n".join(f"- {name}: {value}" for name, value in shown_settings(result["settings"]))
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return (f"# Evaluation of {result['models'][0]}\n\n"
            f"{table(result['tasks'], result['models'], markdown=True)}\n\n"
            f"{EXPLANATION}\n\n## Settings\n\n{settings}\n- versions: {versions}\n")


def shown_settings(settings: dict[str, Any]) -> list[tuple[str, str]]:
    """Returns the settings that are set as (name, text), one per data file."""
    pairs = [(name, str(value)) for name, value in settings.items() if name != "data" and value is not None]
    for about in settings.get("data", ()):
        about = dict(about)
        pairs.append((f"data of {about.pop('task')}", ", ".join(map(str, about.values()))))
    return pairs


def _means(values: Sequence[dict[str, float]], records: Sequence[Record]) -> dict[str, Mean]:
    columns = _columns(values)
    if "judged_nats" in columns:
        return _open_ended_means(columns, [text for record in records for text in generated_texts(record)])
    if "nats" not in columns:
        return {name: mean_of(column) for name, column in columns.items()}
    return {"nats_per_token": ratio_of(columns["nats"], columns["tokens"]),
            "bits_per_byte": ratio_of(columns["nats"] / math.log(2), columns["bytes"])}


def _open_ended_means(columns: dict[str, np.ndarray], texts: Sequence[str]) -> dict[str, Mean]:
    """Returns the judge's perplexity of open-ended texts, with its error by linearization, and distinct-n."""
    means = {}
    if columns["judged_tokens"].any():
        nats = ratio_of(columns["judged_nats"], columns["judged_tokens"])
        perplexity = math.exp(nats.mean)
        error = None if nats.standard_error is None else perplexity * nats.standard_error
        means["generative_perplexity"] = Mean(perplexity, error, nats.count)
    shares = {name: Mean(value, None, len(texts)) for name, value in diversity(texts).items()}
    return means | shares | {"words": mean_of(columns["words"])}


def _vectors(values: Sequence[dict[str, float]]) -> dict[str, np.ndarray]:
    """Returns the metrics that can be paired by item; for texts bits per byte, which no tokenizer affects."""
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
    if scale == 100 and mean.standard_error == 0 and mean.mean in (0, 1):  # equal values: a spread of 0 means nothing
        limit = 100 * (1 - 0.05 ** (1 / mean.count))  # the exact 95 % limit of a share, about 3 / n
        error = f" (< {limit:.1f})" if mean.mean == 0 else f" (> {100 - limit:.1f})"
    return f"{scale * mean.mean:.{digits}f}{error}"


def _difference(found: Difference, scale: float) -> str:
    digits = 1 if scale == 100 else 3
    mean, low, high = (scale * value for value in (found.mean, found.low, found.high))
    return f"{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"
