"""The table, the Markdown and the page of a run."""

from dlm_jax.evaluation.report import cells, markdown_report, page, shown_settings, table

MEANS = {"none": (0.0, 0.0), "all": (1.0, 0.0), "half": (0.5, 0.25)}
GROUPED = {"mean": 0.5, "standard_error": 0.1, "count": 9}
RESULT = {
    "models": ["runs/<a>", "gpt2 (parent)"], "groups": {}, "shortened": {"sums": [256, 32]},
    "settings": {"limit": None, "seed": 0, "data": [{"task": "piqa", "file": "valid.jsonl", "sha256": "ab"}]},
    "versions": {"jax": "1"},
    "tasks": {"piqa": {"items": 3, "costs": {name: {"seconds": 1.25, "tokens": 12, "passes": passes}
                                             for name, passes in (("runs/<a>", 4), ("gpt2 (parent)", 12))}, "metrics": {
        "acc": {"models": {"runs/<a>": {"mean": 0.5, "standard_error": 0.1, "count": 3, "monte_carlo_error": 0.05},
                           "gpt2 (parent)": {"mean": 0.25, "standard_error": None, "count": 3}},
                "difference": {"mean": 0.25, "standard_error": 0.1, "low": 0.1, "high": 0.4, "count": 3}},
        "word_perplexity": {"models": {name: {"mean": 12.0, "standard_error": 1.0, "count": 3}
                                       for name in ("runs/<a>", "gpt2 (parent)")}, "difference": None}}}}}


def test_cells():
    assert cells(RESULT) == [
        ["task", "metric", "items", "<a>", "gpt2 (parent)", "<a> - gpt2 (parent) (95 %)"],
        ["piqa", "acc", "3", "50.0 ± 10.0, MC ± 5.0", "25.0", "+25.0 [+10.0, +40.0]"],
        ["piqa", "word perplexity", "3", "12.000 ± 1.000", "12.000 ± 1.000", "-"],
        ["piqa", "seconds", "3", "1.2", "1.2", "-"],
        ["piqa", "tokens per pass", "3", "3.00", "1.00", "-"]]
    assert table(RESULT).splitlines()[-1] == "sums asks for texts of 256 tokens; 32 are generated, half of a row."


def test_equal_values_have_a_limit():
    metrics = {"acc": {"models": {name: {"mean": mean, "standard_error": error, "count": 3}
                                  for name, (mean, error) in MEANS.items()}, "difference": None}}
    costs = {name: {"seconds": 0.0, "tokens": 0, "passes": 0} for name in MEANS}
    result = {"models": list(MEANS), "groups": {"all": {name: {"acc": GROUPED} for name in MEANS}},
              "tasks": {"task": {"items": 3, "metrics": metrics, "costs": costs}}}
    rows = cells(result)
    assert rows[1][3:6] == ["0.0 (< 63.2)", "100.0 (> 36.8)", "50.0 ± 25.0"]
    assert rows[-1] == ["all", "acc", "9", *["50.0 ± 10.0"] * 3, "-"]


def test_markdown_and_page():
    text = markdown_report(RESULT)
    assert "| piqa | acc | 3 |" in text and "- seed: 0" in text and "- versions: jax 1" in text
    assert "- limit" not in text
    record = {"task": "piqa", "model": "runs/<a>", "filter": "none", "doc_id": 0, "target": "1",
              "arguments": [["Q <b>", " a"]], "filtered_resps": [[-1.5, False]], "values": {"acc": 1.0}}
    html = page(RESULT, [record])
    assert "Q &lt;b&gt;" in html and "<b>&lt;a&gt;</b>" in html and "expected: 1" in html and "acc 1" in html
    assert "<a>" not in html


def test_shown_settings():
    assert shown_settings(RESULT["settings"]) == [("seed", "0"), ("data of piqa", "valid.jsonl, ab")]
