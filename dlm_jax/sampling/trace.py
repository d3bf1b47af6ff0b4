"""What sampling looked like, step by step: collected while it runs, then saved as a page or a picture."""

import dataclasses
import itertools
import json
import os
import pathlib
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dlm_jax.errors import ConfigError, DataError
from dlm_jax.sampling.text import decode

if TYPE_CHECKING:
    from matplotlib.axes import Axes
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
            from dlm_jax.sampling.trace import draw_picture

            draw_picture(beside, self.records[0], tokenizer, caption)
        else:
            from dlm_jax.sampling.trace import page

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


# ---- A trace as one page that plays it: the template `trace.html`, and in it what happened, as JSON.


BROKEN = "\N{REPLACEMENT CHARACTER}"  # how a part of a character decodes
_LONGEST = 8  # tokens in which a character may begin and end


def page(records: Sequence[Record], tokenizer: "PreTrainedTokenizerBase", caption: str) -> str:
    """The page as HTML."""
    content = json.dumps(describe(records, tokenizer, caption), ensure_ascii=False, separators=(",", ":"))
    template = pathlib.Path(__file__).with_name("trace.html").read_text(encoding="utf-8")
    return template.replace("@TRACE@", content.replace("<", "\\u003c"))  # so that no text can end the script


def describe(records: Sequence[Record], tokenizer: "PreTrainedTokenizerBase", caption: str) -> dict:
    """What the page shows, as JSON.

    Keys: `texts` of the tokens that occur, to which all others refer by index, MASKED by -1; and of each sample the
    `first` position to show, the `end` of its text, its tokens at the `start`, its `steps` as flat lists of position,
    token and -100 log p, and `joined`, characters that take several tokens, as (first position, count, character).
    """
    ids = sorted({token for record in records for token in
                  [*record.start.tolist(), *(change.token for change in record.changes)]} - {MASKED})
    index = {MASKED: -1, **{token: i for i, token in enumerate(ids)}}
    texts = token_texts(tokenizer, ids)
    samples = []
    for record in records:
        steps: list[list[int]] = [[] for _ in range(record.num_steps)]
        for step, position, token, log_probability in record.changes:
            steps[step - 1] += [position, index[token], round(min(-100 * log_probability, 9999))]
        final = record.at(record.num_steps)[0].tolist()
        samples.append({"first": int(final[0] in tokenizer.all_special_ids), "end": record.end(tokenizer.eos_token_id),
                        "start": [index[token] for token in record.start.tolist()], "steps": steps,
                        "joined": joined(tokenizer, final, dict(zip(ids, texts, strict=True)))})
    return {"caption": caption, "texts": texts, "samples": samples}


def token_texts(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> list[str]:
    """What each token adds to a text, the space before a word included; of special tokens their name."""
    special = set(tokenizer.all_special_ids)
    return [tokenizer.convert_ids_to_tokens(token) if token in special else _added(tokenizer, [token]) or f"<{token}>"
            for token in ids]


def joined(tokenizer: "PreTrainedTokenizerBase", tokens: Sequence[int],
           texts: dict[int, str]) -> list[tuple[int, int, str]]:
    """Where several of the `tokens` make up a character: the first position, how many they are, and the text."""
    found, position = [], 0
    while position < len(tokens):
        count, text = 1, texts.get(tokens[position], "")
        if BROKEN in text:
            count, text = _whole(tokenizer, list(itertools.takewhile(lambda token: token != MASKED,
                                                                     tokens[position : position + _LONGEST])))
        if count > 1:
            found.append((position, count, text))
        position += count
    return found


def _whole(tokenizer: "PreTrainedTokenizerBase", tokens: Sequence[int]) -> tuple[int, str]:
    """The fewest of the first tokens that end where a character does, and their text; 1 where none do."""
    for count in range(2, len(tokens) + 1):
        text = _added(tokenizer, tokens[:count])
        if BROKEN not in text:
            return count, text
    return 1, ""


def _added(tokenizer: "PreTrainedTokenizerBase", tokens: Sequence[int]) -> str:
    """The text that tokens add to one that stands before them."""
    before = tokenizer("a", add_special_tokens=False)["input_ids"]
    return decode(tokenizer, ["", len(tokens)], [range(len(before), len(before) + len(tokens))], [*before, *tokens])


# ---- A trace as a picture: the text at a few of its steps, one below the other, coloured by confidence.


STAGES = 5
COLUMNS, LINES = 92, 7  # characters a line, and lines a stage; what does not fit is left out
_LINE, _CHARACTER = 0.28, 0.0945  # inches
_MARGIN, _LABEL, _SPACE = 0.4, 0.95, 0.2  # around everything, for the number of the step, between stages
_FONT = {"family": "DejaVu Sans Mono", "size": 11.3, "parse_math": False}  # a character is 0.602 of the size wide
_RAMP = ("#ffab85", "#f3cf8f", "#dcdf9f", "#b9e4d6")  # from unsure to sure
_INK, _SOFT, _MASK = "#1c2127", "#858d96", "#e4e1da"


def draw_picture(path: str | os.PathLike, record: Record, tokenizer: "PreTrainedTokenizerBase", caption: str) -> None:
    """Writes a PNG of `STAGES` steps from the first to the last, the text laid out as it is at the end."""
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure  # not pyplot, whose state is the user's

    ramp = LinearSegmentedColormap.from_list("confidence", _RAMP)
    steps = sorted({round(x) for x in np.linspace(0, record.num_steps, STAGES)})
    stages = [record.at(step) for step in steps]
    ids = sorted({int(token) for tokens, _ in stages for token in tokens} - {MASKED})
    texts = dict(zip(ids, map(mark, token_texts(tokenizer, ids)), strict=True)) | {MASKED: "  "}
    final = stages[-1][0]
    shown = range(int(final[0] in tokenizer.all_special_ids), min(record.end(tokenizer.eos_token_id) + 1, len(final)))
    widths = [max(len(texts[int(tokens[i])].strip()) for tokens, _ in stages) or 1 for i in shown]
    places = lay_out([texts[int(final[i])] for i in shown], widths)
    depth = _LINE * (1 + max((line for line, _ in places), default=0))
    width = _MARGIN + _LABEL + COLUMNS * _CHARACTER + _MARGIN
    height = _MARGIN + len(steps) * (depth + _SPACE) + _LINE + _MARGIN
    figure = Figure(figsize=(width, height), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    for number, (step, (tokens, log_probability)) in enumerate(zip(steps, stages, strict=True)):
        top = _MARGIN + number * (depth + _SPACE)
        _write(axes, _MARGIN, top, f"step {step}", _SOFT)
        for i, (line, column) in zip(shown, places, strict=False):
            x, y = _MARGIN + _LABEL + column * _CHARACTER, top + line * _LINE
            if tokens[i] == MASKED:  # as wide as the token to come, so that the text stays in its place
                _paint(axes, x, y, len(texts[int(final[i])].strip()) or 1, _MASK)
                continue
            text = texts[int(tokens[i])].strip()
            if record.start[i] == MASKED:
                _paint(axes, x, y, len(text), ramp(np.exp(log_probability[i])))
            _write(axes, x, y, text, _INK)
    _write_legend(axes, height - _MARGIN - _LINE, ramp, caption)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # scripts that the font does not have
        figure.savefig(path, dpi=160, format="png")


def mark(text: str) -> str:
    """A token's text with its line breaks shown, one where they follow each other."""
    return text if "\n" not in text else text[: text.index("\n")] + "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}\n"


def lay_out(texts: Sequence[str], widths: Sequence[int]) -> list[tuple[int, int]]:
    """The line and column of each text without the space around it, of as many as fit in `LINES`.

    Lines break between words, of which a text may be a part, and after a text that ends in a line break.
    """
    words: list[list[int]] = []
    for i, text in enumerate(texts):
        if not words or text[:1].isspace() or texts[i - 1][-1:].isspace():
            words.append([])
        words[-1].append(i)
    places, line, column = [], 0, 0
    for word in words:
        column += column > 0 and texts[word[0]][:1].isspace()
        if column and column + sum(widths[i] for i in word) > COLUMNS:
            line, column = line + 1, 0
        for i in word:
            if column and column + widths[i] > COLUMNS:  # a word longer than a line
                line, column = line + 1, 0
            places.append((line, column))
            column += widths[i]
        if texts[word[-1]].endswith("\n"):
            line, column = line + 1, 0
    return [place for place in places if place[0] < LINES]


def _write(axes: "Axes", x: float, y: float, text: str, colour: str) -> None:
    axes.text(x, y + 0.74 * _LINE, text, color=colour, va="baseline", **_FONT)


def _paint(axes: "Axes", x: float, y: float, characters: int, colour: object) -> None:
    from matplotlib.patches import FancyBboxPatch

    gap = 0.012  # between neighbours, which would else be one
    axes.add_patch(FancyBboxPatch((x + gap, y + 0.08 * _LINE), characters * _CHARACTER - 2 * gap, 0.84 * _LINE,
                                  boxstyle="round,pad=0,rounding_size=0.035", facecolor=colour, linewidth=0))


def _write_legend(axes: "Axes", y: float, ramp: object, caption: str) -> None:
    x = _MARGIN + _LABEL
    _paint(axes, x, y, 3, _MASK)
    _write(axes, x + 4 * _CHARACTER, y, "masked", _SOFT)
    x += 13 * _CHARACTER
    for i in range(10):
        _paint(axes, x + i * _CHARACTER, y, 1, ramp(i / 9))
    _write(axes, x + 11 * _CHARACTER, y, "unsure to sure when revealed", _SOFT)
    x += 41 * _CHARACTER
    room = COLUMNS - 54
    caption = caption if len(caption) <= room else caption[: room - 1] + "\N{HORIZONTAL ELLIPSIS}"
    _write(axes, x + (room - len(caption)) * _CHARACTER, y, caption, _SOFT)
