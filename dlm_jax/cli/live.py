"""The text as it forms, drawn over and over in a terminal."""

import dataclasses
import shutil
import sys
import unicodedata
from collections.abc import Collection
from itertools import groupby
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

    from dlm_jax.sampling import Snapshot

MASK = "\N{LIGHT SHADE}"


class Live:
    """An `on_step` that draws each step over the last, and on leaving takes it away again.

    Where standard output is no terminal it draws nothing.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase"):
        self._tokenizer, self._height, self._shows = tokenizer, 0, sys.stdout.isatty()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._shows:
            self._draw([])

    def __call__(self, snapshot: "Snapshot") -> None:
        if not self._shows:
            return
        size = shutil.get_terminal_size()
        texts = [partial_text(self._tokenizer, snapshot.tokens[i], snapshot.masked[i], snapshot.lengths[i])
                 for i in snapshot.rows.argsort()]
        lines = [line for text in texts for line in [*wrap(text, size.columns - 1), ""]]
        room = size.lines - 2
        self._draw([f"step {snapshot.step}", *(lines if len(lines) <= room else [*lines[: room - 1], "..."])])

    def _draw(self, lines: list[str]) -> None:
        # To the first line drawn before, and all from there on away, a progress bar included.
        back = f"\x1b[{self._height}F" if self._height else "\r"
        sys.stdout.write(f"{back}\x1b[J" + "".join(line + "\n" for line in lines))
        sys.stdout.flush()
        self._height = len(lines)


class LiveAnswer(Live):
    """Shows of one row what is written behind its prompt, up to a token that ends it."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", end_token_ids: Collection[int]):
        super().__init__(tokenizer)
        self._ends, self._begin = list(end_token_ids), 0

    def __call__(self, snapshot: "Snapshot") -> None:
        if snapshot.step == 0:
            self._begin = int(snapshot.masked[0].argmax())
        inside = slice(self._begin, int(snapshot.lengths[0]))
        tokens, masked = snapshot.tokens[:1, inside], snapshot.masked[:1, inside]
        ended = (~masked[0] & [token in self._ends for token in tokens[0]]).nonzero()[0]
        length = ended[0] if len(ended) else tokens.shape[1]
        super().__call__(dataclasses.replace(snapshot, tokens=tokens, masked=masked, lengths=[length]))


def partial_text(tokenizer: "PreTrainedTokenizerBase", tokens: "np.ndarray", masked: "np.ndarray", length: int) -> str:
    """The text of a row, arrays [row], with a `MASK` for each token that is missing."""
    from dlm_jax.sampling.text import decode

    pieces, gaps, known = [""], [], []  # what is missing stands for text, the tokens between for gaps that are filled
    for is_masked, run in groupby(range(length), key=lambda i: bool(masked[i])):
        run = list(run)
        if is_masked:
            pieces[-1] = MASK * len(run)
        else:
            gaps.append(range(len(known), len(known) + len(run)))
            known += tokens[run].tolist()
            pieces += [len(run), ""]
    return decode(tokenizer, pieces, gaps, known)


def wrap(text: str, columns: int) -> list[str]:
    """`text` in lines of at most `columns`, broken anywhere; what a terminal might obey becomes a space."""
    lines = []
    for line in text.split("\n"):
        lines.append("")
        used = 0
        for character in line:
            width = 2 if unicodedata.east_asian_width(character) in "WF" else 1
            if used + width > columns:
                lines.append("")
                used = 0
            lines[-1] += character if character.isprintable() else " "
            used += width
    return lines
