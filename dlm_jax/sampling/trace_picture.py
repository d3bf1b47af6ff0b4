"""A trace as a picture: the text at a few of its steps, one below the other, coloured by confidence."""

import os
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from dlm_jax.sampling.trace import MASKED, Record
from dlm_jax.sampling.trace_page import token_texts

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from transformers import PreTrainedTokenizerBase

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
