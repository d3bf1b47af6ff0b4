"""Reports of a run: means with standard errors, paired differences, a table, and one self-contained HTML page."""

import dataclasses
import html
import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dlm_jax.errors import DataError
from dlm_jax.evaluation.generation import diversity
from dlm_jax.evaluation.run import Record, generated_texts

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


_RESAMPLES = 10_000  # of the bootstrap
NOT_SHARES = ("nats_per_token", "bits_per_byte", "generative_perplexity", "words")  # all other metrics are shares
EXPLANATION = (
    "Shares are in percent, ± the standard error over items, or with the 95 % limit if all items are equal. "
    "Differences are paired by item, with the 95 % interval of a bootstrap over items. Smaller nats, bits and "
    "perplexities are better, and a diffusion model's nats and bits are upper bounds.")
_COLORS = ("#1b6ca8", "#d1722e", "#2a9d8f", "#8d5fa8")
_GRAY = "#7c8590"
_EXAMPLES = 3  # right and wrong items shown per task, each
_LONGEST = 600  # characters shown of a text
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2127; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; } h3 { font-size: 1rem; margin: 1.4rem 0 .3rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .25rem .9rem .25rem 0; border-bottom: 1px solid #e3e6ea; vertical-align: top; }
th { font-weight: 600; } .note, figcaption { color: #5c6470; font-size: .9rem; }
figure { margin: 1rem 0; overflow-x: auto; }
pre { white-space: pre-wrap; margin: 0; font: 13px/1.45 ui-monospace, monospace; }
.wide { overflow-x: auto; } .right { color: #1e7a4f; } .wrong { color: #b3362b; } details { margin: .4rem 0; }
"""


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
    head = ["task", "metric", "items", *models]
    head += [f"{models[0]} - {models[1]} (95 %)"] if len(models) > 1 else []
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


def page(result: dict[str, Any], records: Sequence[Record]) -> str:
    """Returns the HTML page of a run: the table, figures, some items and the settings, without external files.

    Args:
      result: as in the JSON file: models, settings, versions, tasks.
      records: one per item and model.
    """
    models, tasks = result["models"], result["tasks"]
    parts = [f"<h1>Evaluation of {_text(models[0])}</h1>", _table(tasks, models),
             f'<p class="note">{_text(EXPLANATION)}</p>']
    if figure := _shares_figure(tasks, models, chance_of(records)):
        parts += ["<h2>Shares</h2>", _picture(figure, "Bars are one standard error; a gray line is chance.")]
    if figure := _differences_figure(tasks, models):
        parts += [f"<h2>{_text(models[0])} minus {_text(models[1])}</h2>",
                  _picture(figure, "On the same items, with 95 % intervals; one that includes 0 shows no difference.")]
    if figure := _margins_figure(records, list(tasks), models):
        parts += ["<h2>How clear the choices are</h2>", _picture(
            figure, "By how many nats per item the right option is more likely than the best other one: "
            "right of 0 it is chosen.")]
    parts += ["<h2>Items</h2>", *(_examples(task, records, models) for task in tasks), "<h2>Settings</h2>",
              _settings(result)]
    body = "\n".join(parts)
    return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Evaluation of {_text(models[0])}'
            f"</title><style>{_STYLE}</style></head><body>\n{body}\n</body></html>\n")


def chance_of(records: Sequence[Record]) -> dict[str, float]:
    """Returns the accuracy of random guessing, by task."""
    shares: dict[str, list[float]] = {}
    for record in records:
        if "picks" in record:
            shares.setdefault(record["task"], []).append(1 / len(record["scores"]))
    return {task: float(np.mean(values)) for task, values in shares.items()}


def _table(tasks: dict[str, Any], models: Sequence[str]) -> str:
    head, *rows = cells(tasks, models)
    lines = ["".join(f"<th>{_text(cell)}</th>" for cell in head),
             *("".join(f"<td>{_text(cell)}</td>" for cell in row) for row in rows)]
    return f'<div class="wide"><table>{"".join(f"<tr>{line}</tr>" for line in lines)}</table></div>'


def _shares_figure(tasks: dict[str, Any], models: Sequence[str], chance: dict[str, float]) -> "Figure | None":
    rows = [(task, metric) for task, found in tasks.items() for metric in found["models"][models[0]]
            if metric not in NOT_SHARES]
    if not rows:
        return None
    figure, axes = _axes(len(rows), 0.24 * len(models) + 0.2)
    for place, (task, metric) in enumerate(rows):
        for number, model in enumerate(models):
            mean = tasks[task]["models"][model].get(metric)
            if mean is None:
                continue
            y = place + (number - (len(models) - 1) / 2) * 0.24
            axes.errorbar(100 * mean["mean"], y, xerr=100 * (mean["standard_error"] or 0), fmt="o", markersize=5,
                          color=_COLORS[number % len(_COLORS)], capsize=2, label=model if not place else None)
        if task in chance and metric.startswith("accuracy"):
            axes.plot([100 * chance[task]] * 2, [place - 0.42, place + 0.42], color=_GRAY, linewidth=1.2)
    _label(axes, rows, "percent")
    if len(models) > 1:
        figure.legend(loc="outside upper left", frameon=False, ncols=len(models), fontsize=9)
    return figure


def _differences_figure(tasks: dict[str, Any], models: Sequence[str]) -> "Figure | None":
    rows = [(task, metric) for task, found in tasks.items() for metric in found.get("differences", ())
            if metric not in NOT_SHARES]
    if not rows:
        return None
    figure, axes = _axes(len(rows), 0.34)
    axes.axvline(0, color=_GRAY, linewidth=1)
    for place, (task, metric) in enumerate(rows):
        found = tasks[task]["differences"][metric]
        mean, low, high = (100 * found[name] for name in ("mean", "low", "high"))
        sure = low > 0 or high < 0
        axes.plot([low, high], [place, place], color=_COLORS[0] if sure else _GRAY, linewidth=2)
        axes.plot(mean, place, "o", markersize=6, color=_COLORS[0] if sure else _GRAY)
    _label(axes, rows, "points")
    return figure


def _margins_figure(records: Sequence[Record], tasks: Sequence[str], models: Sequence[str]) -> "Figure | None":
    margins = {(task, model): [margin(record) for record in records
                               if record["task"] == task and record["model"] == model and "picks" in record]
               for task in tasks for model in models}
    shown = [task for task in tasks if margins[task, models[0]]]
    if not shown:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 2.1 * -(-len(shown) // 2)), layout="constrained")
    grid = figure.subplots(-(-len(shown) // 2), 2, squeeze=False).ravel()
    for axes, task in zip(grid, shown, strict=False):
        values = np.concatenate([margins[task, model] for model in models if margins[task, model]])
        reach = max(float(np.quantile(np.abs(values), 0.98)), 1e-6)
        bins = np.linspace(-reach, reach, 31)
        for number, model in enumerate(models):
            axes.hist(np.clip(margins[task, model], -reach, reach), bins, histtype="step", linewidth=1.5,
                      color=_COLORS[number % len(_COLORS)], label=model if task == shown[0] else None)
        axes.axvline(0, color=_GRAY, linewidth=1)
        axes.set_title(task, fontsize=9, loc="left")
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[len(shown):]:
        axes.set_visible(False)
    if len(models) > 1:
        figure.legend(loc="outside upper left", frameon=False, ncols=len(models), fontsize=9)
    return figure


def margin(record: Record) -> float:
    """Returns by how many nats the right option scores below the best other one."""
    others = [score for option, score in enumerate(record["scores"]) if option != record["gold"]]
    return min(others) - record["scores"][record["gold"]] if others else 0.0


def _axes(rows: int, height: float) -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure  # not pyplot, whose state is the user's

    figure = Figure(figsize=(9, 0.9 + height * rows), layout="constrained")
    return figure, figure.subplots()


def _label(axes: "Axes", rows: Sequence[tuple[str, str]], unit: str) -> None:
    axes.set_yticks(range(len(rows)), [f"{task}, {metric.replace('_', ' ')}" for task, metric in rows], fontsize=9)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel(unit, fontsize=9)
    axes.tick_params(labelsize=9)
    axes.grid(axis="x", alpha=0.25)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _picture(figure: "Figure", caption: str) -> str:
    import matplotlib

    stream = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "dlm", "font.family": "sans-serif"}):
        figure.savefig(stream, format="svg", metadata={"Date": None})
    picture = stream.getvalue()
    return f"<figure>{picture[picture.index('<svg'):]}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _examples(task: str, records: Sequence[Record], models: Sequence[str]) -> str:
    """Returns the first items that the first model answers right and wrong, by its first metric, for all models."""
    of_item: dict[int, dict[str, Record]] = {}
    for record in records:
        if record["task"] == task:
            of_item.setdefault(record["item"], {})[record["model"]] = record
    parts = [f"<h3>{_text(task)}</h3>"]
    for right in (True, False):
        found = [item for item, by_model in of_item.items()
                 if models[0] in by_model and right == (next(iter(by_model[models[0]]["values"].values())) >= 0.5)]
        for item in found[:_EXAMPLES]:
            rows = "".join(f"<tr><th>{_text(model)}</th><td><pre>{_text(_shown(record))}</pre></td></tr>"
                           for model, record in of_item[item].items())
            word = "right" if right else "wrong"
            parts.append(f'<details><summary>item {item}, <span class="{word}">{word}</span></summary>'
                         f"<table>{rows}</table></details>")
    return "\n".join(parts)


def _shown(record: Record) -> str:
    """Returns a record as text."""
    values = ", ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in record["values"].items())
    if "text" in record or "texts" in record:
        lines = record["predictions"] if "predictions" in record else [record.get("prediction", "")]
        shown = [line[:_LONGEST] for line in (lines if any(lines) else generated_texts(record))]
        shown += [f"expected: {' | '.join(record['answers'])[:_LONGEST]}"] if "answers" in record else []
        shown += [f"outcome: {', '.join(record['outcomes'])}"] if "outcomes" in record else []
        return "\n".join([*shown, values])
    if "picks" in record:
        scores = ", ".join(f"{'*' if option == record['gold'] else ''}{score:.2f}"
                           for option, score in enumerate(record["scores"]))
        return f"nats of the options (* the right one): {scores}\n{values}"
    return values


def _settings(result: dict[str, Any]) -> str:
    rows = "".join(f"<tr><th>{_text(name)}</th><td>{_text(value)}</td></tr>"
                   for name, value in [*shown_settings(result["settings"]), *result["versions"].items()])
    return f"<table>{rows}</table>"


def _text(value: object) -> str:
    return html.escape(str(value))
