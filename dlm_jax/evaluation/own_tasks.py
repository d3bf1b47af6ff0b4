"""The kinds of lm-eval task that lm-eval lacks: gaps between two texts, reconstruction, and open-ended texts.

The YAML files in `tasks/` name these classes. Each makes requests of a kind that `lm_eval.LmEvalAdapter` has a method
for: `infill`, `reconstruct`, `generate_and_judge`. It needs the package lm-eval.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean
from lm_eval.api.task import ConfigurableTask
from lm_eval.utils import apply_template

from dlm_jax.evaluation.code_eval import Outcome, Program
from dlm_jax.evaluation.metrics import distinct, first_sentence, rouge_l, rouge_n
from dlm_jax.evaluation.scoring import RECONSTRUCTION_RATIOS

_NGRAM_SIZES = (1, 2, 3)  # of distinct-n
Doc = dict[str, Any]


class OwnTask(ConfigurableTask):
    """A task whose requests lm-eval does not know; its options are under `metadata`.

    Attributes:
      generates: whether models write texts for it.
      execute: runs programs; the loader of tasks sets it where the user allows that.
    """

    generates = True
    execute: Callable[[Sequence[Program]], list[Outcome]]

    def __init__(self, config: dict[str, Any]):
        super().__init__(config={name: value for name, value in config.items() if name != "class"})

    @property
    def options(self) -> dict[str, Any]:
        return self.config.metadata

    def _request(self, kind: str, doc: Doc, arguments: tuple, metadata: tuple, number: int = 0) -> Instance:
        return Instance(kind, doc, arguments, number, metadata=metadata)

    def apply_filters(self) -> None:
        """Takes the answers as they are: filters are for texts and likelihoods."""
        for instance in self.instances:
            instance.filtered_resps["none"] = instance.resps[0]

    def higher_is_better(self) -> dict[str, bool]:
        return {name: name != "generative_perplexity" for name in self.aggregation()}


class GapTask(OwnTask):
    """A gap between `doc_to_text` and the option `suffix`, judged by the option `judge`: "rouge" or "pass@1".

    For the latter the option `tests` is what runs after the program.
    """

    def suffix_of(self, doc: Doc) -> str:
        """Returns the text after the gap."""
        return apply_template(self.options["suffix"], doc)

    def judge_gap(self, doc: Doc, text: str) -> dict[str, float]:
        """Returns ROUGE-1, -2 and -L between 0 and 1, or whether all tests pass."""
        if self.options["judge"] == "rouge":
            solution = str(self.doc_to_target(doc))
            return {"rouge1": rouge_n(text, solution, 1), "rouge2": rouge_n(text, solution, 2),
                    "rougeL": rouge_l(text, solution)}
        source = self.doc_to_text(doc) + text + self.suffix_of(doc)
        outcome, = self.execute([Program(source, apply_template(self.options["tests"], doc))])
        return {"pass@1": float(outcome.passed)}

    def aggregation(self) -> dict[str, Callable]:
        names = ("rouge1", "rouge2", "rougeL") if self.options["judge"] == "rouge" else ("pass@1",)
        return dict.fromkeys(names, mean)


class InfillingTask(GapTask):
    """A gap whose length is unknown.

    Its length in tokens is one of the option `lengths`, [first, last, step]; a model that generates from left to right
    sees nothing after the gap and generates the most. Its text is cut as `cut` says: after a "sentence" or a "line", or
    before the "next_line" that follows the gap.
    """

    def construct_requests(self, doc: Doc, ctx: str, metadata: tuple, **_: object) -> Instance:
        first, last, *step = self.options["lengths"]
        return self._request("infill", doc, (ctx, self.suffix_of(doc), range(first, last + 1, *step)), metadata)

    def process_results(self, doc: Doc, results: Sequence[dict[str, Any]]) -> dict[str, float]:
        answer, text = results[0], results[0]["text"]
        if answer["left_to_right"]:
            text = _CUTS[self.options["cut"]](text, self.suffix_of(doc), str(self.doc_to_target(doc)))
        return self.judge_gap(doc, text)


class ReconstructionTask(OwnTask):
    """The masked tokens of a text whose top-1 prediction is right, at several ratios."""

    generates = False

    def construct_requests(self, doc: Doc, ctx: str, metadata: tuple, **_: object) -> Instance:
        return self._request("reconstruct", doc, (self.doc_to_target(doc),), metadata)

    def process_results(self, doc: Doc, results: Sequence[dict[str, float]]) -> dict[str, float]:
        return results[0]

    def aggregation(self) -> dict[str, Callable]:
        return dict.fromkeys((f"{ratio:.0%} masked" for ratio in RECONSTRUCTION_RATIOS), mean)


class OpenEndedTask(OwnTask):
    """Sampled continuations: their perplexity under the judge, and how much of them repeats.

    Options: `length` in tokens, `temperature`. Perplexity alone rewards repetition, so read it beside distinct-n.
    """

    def construct_requests(self, doc: Doc, ctx: str, metadata: tuple, **_: object) -> Instance:
        settings = {name: self.options[name] for name in ("length", "temperature")}
        return self._request("generate_and_judge", doc, (ctx, settings), metadata)

    def process_results(self, doc: Doc, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Returns the judge's (nats, tokens) of the text, the text for each distinct-n, and its number of words."""
        answer = results[0]
        return {"generative_perplexity": (answer["nats"], answer["tokens"]),
                **{f"distinct_{n}": answer["text"] for n in _NGRAM_SIZES}, "words": len(answer["text"].split())}

    def aggregation(self) -> dict[str, Callable]:
        return {"generative_perplexity": _perplexity, **{f"distinct_{n}": _distinct_of(n) for n in _NGRAM_SIZES},
                "words": mean}


def cut_line(text: str, suffix: str, solution: str) -> str:
    """Returns the text up to its first line that is not blank, with the end of the line."""
    lines = text.split("\n")
    first = next((number for number, line in enumerate(lines) if line.strip()), 0)
    return "\n".join(lines[: first + 1]) + "\n"


def cut_next_line(text: str, suffix: str, solution: str) -> str:
    """Returns the text before the first line that equals the one after the gap.

    If the gap ends within a line, it is cut before the first end of a line that equals the end of the gap's own.
    """
    next_line = next((line.rstrip() for line in suffix.split("\n") if line.strip()), None)
    if next_line is None:
        return text
    line_start = "^" if solution.endswith("\n") else ""
    found = re.search(rf"{line_start}{re.escape(next_line)}[ \t\r]*$", text, re.MULTILINE)
    return text[: found.start()] if found else text


_CUTS = {"sentence": lambda text, suffix, solution: first_sentence(text), "line": cut_line, "next_line": cut_next_line}


def _perplexity(values: Sequence[tuple[float, int]]) -> float:
    nats, tokens = map(math.fsum, zip(*values, strict=True))
    return math.exp(nats / tokens) if tokens else math.nan


def _distinct_of(n: int) -> Callable[[Sequence[str]], float]:
    return lambda texts: distinct(texts, n)
