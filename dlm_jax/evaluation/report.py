"""Reports of a run as a table, as Markdown and as a page: means with errors, paired differences, and costs."""

import html
from collections.abc import Sequence
from typing import Any

from dlm_jax.evaluation.compare import Difference, Mean

_NOT_SHARES = ("perplexity", "bits", "nats", "words", "seconds", "tokens", "mcc", "brier")  # parts of metrics' names
_SHOWN_ITEMS = 5  # of each task, in the page
EXPLANATION = (
    "Shares are in percent, ± the standard error over items, or with the 95 % limit if all items are equal. MC ± is an "
    "upper estimate of the error from the random masks of a bound. Differences are paired by item, with the 95 % "
    "interval of a bootstrap over items. Smaller bits and perplexities are better, and a diffusion model's are upper "
    "bounds.")


def cells(result: dict[str, Any]) -> list[list[str]]:
    """Returns the header, and the rows of each task: its metrics, its seconds, and its tokens per forward pass."""
    models = result["models"]
    names = short_names(models)
    head = ["task", "metric", "items", *names]
    head += [f"{names[0]} - {names[1]} (95 %)"] if len(models) > 1 else []
    rows = [head]
    for task, found in result["tasks"].items():
        for metric, of in found["metrics"].items():
            scale = 1 if any(part in metric for part in _NOT_SHARES) else 100
            row = [task, metric.replace("_", " "), str(found["items"])]
            row += [_mean(Mean(**of["models"][model]), scale) for model in models]
            if len(models) > 1:
                row.append(_difference(Difference(**of["difference"]), scale) if of["difference"] else "-")
            rows.append(row)
        costs = [found["costs"][model] for model in models]
        end = ["-"] if len(models) > 1 else []
        rows.append([task, "seconds", str(found["items"]), *(f"{cost['seconds']:.1f}" for cost in costs), *end])
        if any(cost["passes"] for cost in costs):
            rows.append([task, "tokens per pass", str(found["items"]),
                         *(f"{cost['tokens'] / max(cost['passes'], 1):.2f}" for cost in costs), *end])
    for group, of_model in result["groups"].items():
        for metric in of_model[models[0]]:
            scale = 1 if any(part in metric for part in _NOT_SHARES) else 100
            values = [Mean(**of_model[model][metric]) for model in models]
            rows.append([group, metric.replace("_", " "), str(values[0].count), *(_mean(one, scale) for one in values),
                         *(["-"] if len(models) > 1 else [])])
    return rows


def short_names(models: Sequence[str]) -> list[str]:
    """Returns the models' names without their directories, unless two would be called the same."""
    short = [name.rstrip("/").rpartition("/")[2] for name in models]
    return short if len(set(short)) == len(models) else list(models)


def table(result: dict[str, Any], *, markdown: bool = False) -> str:
    """Returns `cells` as aligned columns, or as Markdown; then the texts that were shortened."""
    rows = cells(result)
    notes = [f"{task} asks for texts of {asked} tokens; {generated} are generated, half of a row."
             for task, (asked, generated) in result.get("shortened", {}).items()]
    if markdown:
        lines = [f"| {' | '.join(row)} |" for row in rows]
        lines.insert(1, "|" + " --- |" * len(rows[0]))
        return "\n".join([*lines, *(["", *notes] if notes else [])])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
                      for row in rows] + notes)


def markdown_report(result: dict[str, Any]) -> str:
    """Returns the table as Markdown, with the settings that reproduce it."""
    settings = "\n".join(f"- {name}: {value}" for name, value in shown_settings(result["settings"]))
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return (f"# Evaluation of {result['models'][0]}\n\n{table(result, markdown=True)}\n\n{EXPLANATION}\n\n"
            f"## Settings\n\n{settings}\n- versions: {versions}\n")


def page(result: dict[str, Any], records: Sequence[dict[str, Any]]) -> str:
    """Returns one HTML page: the table, the first items of each task with what every model answered, the settings."""
    head, *rows = cells(result)
    lines = ["<tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    names = dict(zip(result["models"], short_names(result["models"]), strict=True))
    items = []
    for task in result["tasks"]:
        items.append(f"<h2>{html.escape(task)}</h2>")
        own = [record for record in records if record["task"] == task]
        for number in list(dict.fromkeys(record["doc_id"] for record in own))[:_SHOWN_ITEMS]:
            shown = [record for record in own if record["doc_id"] == number]
            prompt = shown[0]["arguments"][0][0]
            items.append(f"<details><summary>item {number}</summary><pre>{html.escape(str(prompt))}</pre><ul>")
            items += [f"<li><b>{html.escape(names[record['model']])}</b> {html.escape(_answer(record))}</li>"
                      for record in shown]
            items.append(f"<li>expected: {html.escape(str(shown[0]['target']))}</li></ul></details>")
    settings = "".join(f"<li>{html.escape(name)}: {html.escape(value)}</li>"
                       for name, value in shown_settings(result["settings"]))
    return _PAGE.format(title=html.escape(f"Evaluation of {names[result['models'][0]]}"), rows="\n".join(lines),
                        explanation=html.escape(EXPLANATION), items="\n".join(items), settings=settings)


def shown_settings(settings: dict[str, Any]) -> list[tuple[str, str]]:
    """Returns the settings that are set as (name, text), one per data file."""
    pairs = [(name, str(value)) for name, value in settings.items() if name != "data" and value is not None]
    for about in settings.get("data", ()):
        about = dict(about)
        pairs.append((f"data of {about.pop('task')}", ", ".join(map(str, about.values()))))
    return pairs


def _answer(record: dict[str, Any]) -> str:
    values = ", ".join(f"{name} {value:.3g}" for name, value in record["values"].items()
                       if isinstance(value, (int, float)))
    answers = "; ".join(str(answer[0] if isinstance(answer, list) and len(answer) == 1 else answer)
                        for answer in record["filtered_resps"])
    return f"{answers} ({record['filter']}: {values})" if record["filter"] != "none" else f"{answers} ({values})"


def _mean(mean: Mean, scale: float) -> str:
    digits = 1 if scale == 100 else 3
    error = "" if mean.standard_error is None else f" ± {scale * mean.standard_error:.{digits}f}"
    if scale == 100 and mean.standard_error == 0 and mean.mean in (0, 1):  # equal values: a spread of 0 means nothing
        limit = 100 * (1 - 0.05 ** (1 / mean.count))  # the exact 95 % limit of a share, about 3 / n
        error = f" (< {limit:.1f})" if mean.mean == 0 else f" (> {100 - limit:.1f})"
    if mean.monte_carlo_error is not None:
        error += f", MC ± {scale * mean.monte_carlo_error:.{digits}f}"
    return f"{scale * mean.mean:.{digits}f}{error}"


def _difference(found: Difference, scale: float) -> str:
    digits = 1 if scale == 100 else 3
    mean, low, high = (scale * value for value in (found.mean, found.low, found.high))
    return f"{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; color: #222 }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; display: block; overflow-x: auto }}
th, td {{ text-align: left; padding: .25rem .75rem .25rem 0; border-bottom: 1px solid #ddd; white-space: nowrap }}
pre {{ white-space: pre-wrap; background: #f6f6f6; padding: .75rem }}
</style>
<h1>{title}</h1><table>
{rows}
</table><p>{explanation}</p>
{items}
<h2>Settings</h2><ul>{settings}</ul></html>
"""
