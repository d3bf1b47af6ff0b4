"""What sampling looked like, step by step: collected while it runs, then saved as a page or a picture."""

import dataclasses
import os
import pathlib
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dlm_jax.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MASKED = -1  # stands for a token that is not there yet
SUFFIXES = (".html", ".png")


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A batch after a step.

    Attributes:
      step: 0 before the first step.
      rows: int [batch], which of the texts asked for each row is.
      lengths: int [batch]; the rest of a row is padding.
      tokens: int [batch, length], the mask's id where masked.
      masked: bool [batch, length].
      confidence: float32 [batch, length], the log-probability of each token when it was drawn, 0 where given.
    """

    step: int
    rows: np.ndarray
    lengths: np.ndarray
    tokens: np.ndarray
    masked: np.ndarray
    confidence: np.ndarray


class Change(NamedTuple):
    """A token is revealed, or replaced, or MASKED again."""

    step: int
    position: int
    token: int
    log_probability: float


@dataclasses.dataclass(frozen=True)
class Record:
    """How one text came about: int tokens [length] before the first step, MASKED in gaps, and every change since."""

    start: np.ndarray
    changes: list[Change] = dataclasses.field(default_factory=list)

    @property
    def num_steps(self) -> int:
        return self.changes[-1].step if self.changes else 0

    def end(self, eos_token_id: int | None) -> int:
        """The position of an end of text with nothing but gaps behind it; the length where none was drawn."""
        behind = np.cumsum(self.start[::-1] != MASKED)[::-1]
        final, _ = self.at(self.num_steps)
        ends = np.flatnonzero((behind == 0) & (final == eos_token_id))
        return int(ends[0]) if len(ends) else len(final)

    def at(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens int [length] and their log-probabilities float [length] after `step`; 0 where given or masked."""
        tokens, log_probability = self.start.copy(), np.zeros(len(self.start))
        for change in self.changes:
            if change.step <= step:
                tokens[change.position] = change.token
                log_probability[change.position] = change.log_probability
        return tokens, log_probability


class Trace:
    """Collects one call of `DiffusionLM.generate` or `infill`, which takes it as `on_step`.

      trace = Trace()
      lm.generate(["Once upon a time"], on_step=trace)
      trace.save("story.html", lm.tokenizer)
    """

    def __init__(self) -> None:
        self._records: dict[int, Record] = {}
        self._latest: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __call__(self, snapshot: Snapshot) -> None:
        for i, row in enumerate(snapshot.rows.tolist()):
            inside = slice(snapshot.lengths[i])
            masked = snapshot.masked[i, inside]
            tokens = np.where(masked, MASKED, snapshot.tokens[i, inside])
            confidence = np.where(masked, 0, snapshot.confidence[i, inside])
            if snapshot.step == 0:
                self._records[row] = Record(tokens)
            else:
                before, sure = self._latest[row]
                for position in np.flatnonzero((tokens != before) | (confidence != sure)).tolist():
                    self._records[row].changes.append(
                        Change(snapshot.step, position, int(tokens[position]), float(confidence[position])))
            self._latest[row] = tokens, confidence

    @property
    def records(self) -> list[Record]:
        """Of each text, in the order in which they were asked for."""
        return [self._records[row] for row in sorted(self._records)]

    def save(self, path: str | os.PathLike, tokenizer: "PreTrainedTokenizerBase", caption: str = "") -> None:
        """Writes a page that plays the steps (.html, of all texts) or a picture of some of them (.png, of the first).

        Args:
          caption: a line about where the texts come from.

        Raises:
          ConfigError: the path has another suffix, or lies in no folder.
          DataError: nothing has been collected.
        """
        check_path(path)
        if not self._records:
            raise DataError("the trace is empty; give it to generate or infill as on_step, then save it")
        path = pathlib.Path(path)
        beside = path.with_name(path.name + ".new")
        if path.suffix.lower() == ".png":
            from dlm_jax.sampling.trace_picture import draw_picture

            draw_picture(beside, self.records[0], tokenizer, caption)
        else:
            from dlm_jax.sampling.trace_page import page

            beside.write_text(page(self.records, tokenizer, caption), encoding="utf-8")
        os.replace(beside, path)


def check_path(path: str | os.PathLike) -> None:
    """Refuses, before the work, a path that `Trace.save` could not write to."""
    path = pathlib.Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"a trace is a page or a picture, and {path} is neither; let its name end in "
                          f"{' or '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise ConfigError(f"there is no folder {path.parent} for the trace {path.name}; make it, or name another")
