"""What sampling did at each step: recorded while it runs, saved as a page that plays it or as a picture."""

import dataclasses
import json
import os
import pathlib
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dlm_jax.errors import ConfigError, DataError
from dlm_jax.sampling.text import GAP, TokenTexts

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from transformers import PreTrainedTokenizerBase

SUFFIXES = (".html", ".png")


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A batch after a step.

    Attributes:
      step: 0 before the first step.
      rows: int [batch], the index of each row's text.
      lengths: int [batch]; later positions are padding.
      tokens: int [batch, length], the mask token where masked.
      masked: bool [batch, length].
      confidence: float32 [batch, length], the log-probability of each token when it was sampled, 0 where given.
    """

    step: int
    rows: np.ndarray
    lengths: np.ndarray
    tokens: np.ndarray
    masked: np.ndarray
    confidence: np.ndarray


class Change(NamedTuple):
    """A token is revealed, replaced, or masked again: GAP."""

    step: int
    position: int
    token: int
    log_prob: float


@dataclasses.dataclass(frozen=True)
class History:
    """How one text came about: int tokens [length] before the first step, GAP where masked, and every change since."""

    start: np.ndarray
    changes: list[Change] = dataclasses.field(default_factory=list)

    @property
    def num_steps(self) -> int:
        return self.changes[-1].step if self.changes else 0

    def end(self, eos_token_id: int | None) -> int:
        """Returns the position of the first EOS with nothing but gaps after it; the length where there is none."""
        given_later = np.cumsum(self.start[::-1] != GAP)[::-1]
        final, _ = self.at(self.num_steps)
        ends = np.flatnonzero((given_later == 0) & (final == eos_token_id))
        return int(ends[0]) if len(ends) else len(final)

    def at(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns tokens int [length] and log-probabilities float [length] after `step`; 0 where given or masked."""
        tokens, log_prob = self.start.copy(), np.zeros(len(self.start))
        for change in self.changes:
            if change.step <= step:
                tokens[change.position] = change.token
                log_prob[change.position] = change.log_prob
        return tokens, log_prob


class Trace:
    """Records one call of `DiffusionLM.generate` or `infill`, as its `on_step`.

      trace = Trace()
      lm.generate(["Once upon a time"], on_step=trace)
      trace.save("story.html", lm.tokenizer)
    """

    def __init__(self) -> None:
        self._histories: dict[int, History] = {}
        self._latest: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __call__(self, snapshot: Snapshot) -> None:
        for i, row in enumerate(snapshot.rows.tolist()):
            inside = slice(snapshot.lengths[i])
            masked = snapshot.masked[i, inside]
            tokens = np.where(masked, GAP, snapshot.tokens[i, inside])
            log_prob = np.where(masked, 0, snapshot.confidence[i, inside])
            if snapshot.step == 0:
                self._histories[row] = History(tokens)
            else:
                old_tokens, old_log_prob = self._latest[row]
                for position in np.flatnonzero((tokens != old_tokens) | (log_prob != old_log_prob)).tolist():
                    self._histories[row].changes.append(
                        Change(snapshot.step, position, int(tokens[position]), float(log_prob[position])))
            self._latest[row] = tokens, log_prob

    @property
    def histories(self) -> list[History]:
        """The history of each text, in the order of the texts."""
        return [self._histories[row] for row in sorted(self._histories)]

    def save(self, path: str | os.PathLike, tokenizer: "PreTrainedTokenizerBase", caption: str = "") -> None:
        """Writes a page that plays the steps of all texts (.html) or a picture of some steps of the first (.png).

        Args:
          caption: a line on where the texts come from.

        Raises:
          ConfigError: the path has another suffix, or no such folder.
          DataError: nothing has been recorded.
        """
        check_path(path)
        if not self._histories:
            raise DataError("the trace is empty; pass it to generate or infill as on_step, then save it")
        path = pathlib.Path(path)
        temporary = path.with_name(path.name + ".new")
        if path.suffix.lower() == ".png":
            draw_picture(temporary, self.histories[0], tokenizer, caption)
        else:
            temporary.write_text(render_page(self.histories, tokenizer, caption), encoding="utf-8")
        os.replace(temporary, path)


def check_path(path: str | os.PathLike) -> None:
    """Raises ConfigError for a path that `Trace.save` cannot write to, before any sampling."""
    path = pathlib.Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"a trace is a page or a picture, and {path} is neither; end its name in "
                          f"{' or '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise ConfigError(f"there is no folder {path.parent} for the trace {path.name}; create it, or name another")


# The page: the template `trace.html` with the histories as JSON.


def render_page(histories: Sequence[History], tokenizer: "PreTrainedTokenizerBase", caption: str) -> str:
    """Returns the page as HTML."""
    content = json.dumps(page_content(histories, tokenizer, caption), ensure_ascii=False, separators=(",", ":"))
    template = pathlib.Path(__file__).with_name("trace.html").read_text(encoding="utf-8")
    return template.replace("@TRACE@", content.replace("<", "\\u003c"))  # so that no text can end the script


def page_content(histories: Sequence[History], tokenizer: "PreTrainedTokenizerBase", caption: str) -> dict:
    """Returns what the page shows, for JSON.

    Keys: `texts` of the tokens that occur, to which all others refer by index, GAP by -1; and for each sample the
    `first` position to show, the `end` of its text, its tokens at the `start`, its `steps` as flat lists of position,
    token and -100 log p, and `joined`, characters of several tokens, as (first position, count, character).
    """
    ids = sorted({token for history in histories for token in
                  [*history.start.tolist(), *(change.token for change in history.changes)]} - {GAP})
    index = {GAP: -1, **{token: i for i, token in enumerate(ids)}}
    texts, samples = TokenTexts(tokenizer), []
    for history in histories:
        steps: list[list[int]] = [[] for _ in range(history.num_steps)]
        for step, position, token, log_prob in history.changes:
            steps[step - 1] += [position, index[token], round(min(-100 * log_prob, 9999))]
        final = history.at(history.num_steps)[0].tolist()
        samples.append({"first": int(texts.is_special(final[0])), "end": history.end(tokenizer.eos_token_id),
                        "start": [index[token] for token in history.start.tolist()], "steps": steps,
                        "joined": texts.joined(final)})
    return {"caption": caption, "texts": [texts.text(token) for token in ids], "samples": samples}


# The picture: the text at a few of its steps, one below the other, colored by confidence. Lengths in inches.

NUM_FRAMES = 5
COLUMNS, LINES = 92, 7  # characters per line and lines per frame; longer texts are cut
_LINE, _CHARACTER = 0.28, 0.0945
_BORDER, _LABEL, _SPACE = 0.4, 0.95, 0.2  # around the picture, for the step's number, between frames
_FONT = {"family": "DejaVu Sans Mono", "size": 11.3, "parse_math": False}  # a character is 0.602 of the size wide
_RAMP = ("#ffab85", "#f3cf8f", "#dcdf9f", "#b9e4d6")  # from uncertain to certain
_BLACK, _GRAY, _MASK = "#1c2127", "#858d96", "#e4e1da"


def draw_picture(path: str | os.PathLike, history: History, tokenizer: "PreTrainedTokenizerBase", caption: str) -> None:
    """Writes a PNG of `NUM_FRAMES` steps from the first to the last, in the layout of the final text."""
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure  # not pyplot, whose state is the user's

    ramp = LinearSegmentedColormap.from_list("confidence", _RAMP)
    steps = sorted({round(x) for x in np.linspace(0, history.num_steps, NUM_FRAMES)})
    frames = [history.at(step) for step in steps]
    ids = sorted({int(token) for tokens, _ in frames for token in tokens} - {GAP})
    of_token = TokenTexts(tokenizer)
    texts = {GAP: "  ", **{token: show_line_breaks(of_token.text(token)) for token in ids}}
    final = frames[-1][0]
    shown = range(int(of_token.is_special(int(final[0]))), min(history.end(tokenizer.eos_token_id) + 1, len(final)))
    widths = [max(len(texts[int(tokens[i])].strip()) for tokens, _ in frames) or 1 for i in shown]
    places = lay_out([texts[int(final[i])] for i in shown], widths)
    frame_height = _LINE * (1 + max((line for line, _ in places), default=0))
    width = _BORDER + _LABEL + COLUMNS * _CHARACTER + _BORDER
    height = _BORDER + len(steps) * (frame_height + _SPACE) + _LINE + _BORDER
    figure = Figure(figsize=(width, height), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    for number, (step, (tokens, log_prob)) in enumerate(zip(steps, frames, strict=True)):
        top = _BORDER + number * (frame_height + _SPACE)
        _write(axes, _BORDER, top, f"step {step}", _GRAY)
        for i, (line, column) in zip(shown, places, strict=False):
            x, y = _BORDER + _LABEL + column * _CHARACTER, top + line * _LINE
            if tokens[i] == GAP:  # as wide as the final token, so that the text does not move
                _fill_box(axes, x, y, len(texts[int(final[i])].strip()) or 1, _MASK)
                continue
            text = texts[int(tokens[i])].strip()
            if history.start[i] == GAP:
                _fill_box(axes, x, y, len(text), ramp(np.exp(log_prob[i])))
            _write(axes, x, y, text, _BLACK)
    _write_legend(axes, height - _BORDER - _LINE, ramp, caption)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # scripts that the font does not have
        figure.savefig(path, dpi=160, format="png")


def show_line_breaks(text: str) -> str:
    """Returns a token's text with a visible sign for its line breaks, one for several in a row."""
    return text if "\n" not in text else text[: text.index("\n")] + "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}\n"


def lay_out(texts: Sequence[str], widths: Sequence[int]) -> list[tuple[int, int]]:
    """Returns the line and column of each text without the space around it, for as many as fit in `LINES`.

    Lines break between words, which may consist of several texts, and after a text that ends in a line break.
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


def _write(axes: "Axes", x: float, y: float, text: str, color: str) -> None:
    axes.text(x, y + 0.74 * _LINE, text, color=color, va="baseline", **_FONT)


def _fill_box(axes: "Axes", x: float, y: float, characters: int, color: object) -> None:
    from matplotlib.patches import FancyBboxPatch

    gap = 0.012  # so that neighbors do not look like one box
    axes.add_patch(FancyBboxPatch((x + gap, y + 0.08 * _LINE), characters * _CHARACTER - 2 * gap, 0.84 * _LINE,
                                  boxstyle="round,pad=0,rounding_size=0.035", facecolor=color, linewidth=0))


def _write_legend(axes: "Axes", y: float, ramp: object, caption: str) -> None:
    x = _BORDER + _LABEL
    _fill_box(axes, x, y, 3, _MASK)
    _write(axes, x + 4 * _CHARACTER, y, "masked", _GRAY)
    x += 13 * _CHARACTER
    for i in range(10):
        _fill_box(axes, x + i * _CHARACTER, y, 1, ramp(i / 9))
    _write(axes, x + 11 * _CHARACTER, y, "probability when revealed", _GRAY)
    x += 41 * _CHARACTER
    room = COLUMNS - 54
    caption = caption if len(caption) <= room else caption[: room - 1] + "\N{HORIZONTAL ELLIPSIS}"
    _write(axes, x + (room - len(caption)) * _CHARACTER, y, caption, _GRAY)
