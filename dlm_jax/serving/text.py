"""From the changes of a row to its text: what is final, from the left, and is never taken back.

    changes of a row, in any order
      |  FinalTokens   the tokens from the left that can no longer change
      |  GapText       their text, without a character that is incomplete so far
      v  RowText       without what may become a stop string; its end and the reason, and log-probabilities

Tokens are read one at a time, whatever number comes at once: where a text ends and how many tokens it took do not
depend on how the row was computed.
"""

import dataclasses
import itertools
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

from dlm_jax.sampling.spec import SamplingSpec
from dlm_jax.sampling.text import BROKEN, GAP, Segment, TokenTexts, text_after
from dlm_jax.sampling.trace import Change
from dlm_jax.serving.protocol import TokenLogProb


class GapText:
    """The text of a gap's tokens, one by one: what they add to the text of all earlier tokens.

    Args:
      before: the tokens before the gap.
      omit_space: whether a space at the start is omitted, because the given text before the gap has it.
    """

    def __init__(self, texts: TokenTexts, before: Sequence[int], *, omit_space: bool = False):
        self._texts, self._tokens, self._omit_space = texts, list(before), omit_space
        self._rest, self._in_bytes = "", False
        self._move_on()

    def add(self, token: int) -> str:
        """Returns the text that is certain with this token, and was not before."""
        self._tokens.append(token)
        text = self._texts.decode(self._tokens[self._start :])
        self._rest = text_after(text, self._known)
        self._in_bytes = self._texts.is_byte(token) or (self._in_bytes and self._texts.is_special(token))
        if text.endswith(BROKEN) or self._in_bytes:
            return ""
        certain = self.finish()
        self._move_on()
        return certain

    def finish(self) -> str:
        """Returns the text that waited for more tokens, at the end of the gap."""
        rest, self._rest = self._rest, ""
        if rest and self._omit_space:
            rest, self._omit_space = rest.removeprefix(" "), False
        return rest

    def _move_on(self) -> None:
        """Starts to decode at a token near the end: decoding everything for each token would be quadratic."""
        self._start = next((i for i in reversed(range(len(self._tokens))) if self._texts.is_anchor(self._tokens[i])), 0)
        self._known = self._texts.decode(self._tokens[self._start :])


def final_groups(row: Sequence[int], spec: SamplingSpec) -> list[int]:
    """Returns for each GAP of a row how many of them must be filled, from the left, before it is final.

    Without remasking a token stays as it is. With it, a token may be masked again until its block is full: an aligned
    block of a model with blocks, or as `sampling.spec.block_ids` numbers them.
    """
    gaps, block_length = [position for position, token in enumerate(row) if token == GAP], spec.config.block_length
    if not spec.config.remask:
        return list(range(1, len(gaps) + 1))
    blocks, end, block = [], 0, -1
    for position in gaps:
        if spec.blocks is not None:
            block = position // spec.blocks.size
        elif position >= end:
            block, end = block + 1, position + block_length if block_length else gaps[-1] + 1
        blocks.append(block)
    last = {block: number for number, block in enumerate(blocks, 1)}
    return [last[block] for block in blocks]


class FinalTokens:
    """The tokens of a row's gaps that are final, from the left.

    Args:
      row: tokens, GAP in gaps.
      needed: see `final_groups`.
    """

    def __init__(self, row: Sequence[int], needed: Sequence[int]):
        self.tokens, self.log_probs = list(row), [0.0] * len(row)
        self.gaps = [position for position, token in enumerate(row) if token == GAP]
        self._needed, self._filled, self._taken = needed, 0, 0

    def apply(self, changes: Sequence[Change], *, is_last: bool) -> Iterator[tuple[int, int]]:
        """Applies the changes; yields the step and the position of each token that is now final."""
        for step, group in itertools.groupby(changes, key=lambda change: change.step):
            for change in group:
                self.tokens[change.position], self.log_probs[change.position] = change.token, change.log_prob
                if change.token == GAP:
                    self._filled = min(self._filled, self._taken)  # a later position that was filled is open again
            yield from ((step, position) for position in self._take())
        if is_last:
            step = changes[-1].step if changes else 0
            yield from ((step, position) for position in self._take(all_filled=True))

    def _take(self, *, all_filled: bool = False) -> list[int]:
        while self._filled < len(self.gaps) and self.tokens[self.gaps[self._filled]] != GAP:
            self._filled += 1
        end = self._taken
        while end < self._filled and (all_filled or self._needed[end] <= self._filled):
            end += 1
        taken, self._taken = self.gaps[self._taken : end], end
        return taken


@dataclasses.dataclass(frozen=True)
class TextFormat:
    """How the text of a row is read.

    Attributes:
      segments: given texts and lengths of gaps, in turn, as in `sampling.text.decode`.
      gaps: the positions of the gaps.
      ends: tokens that end the text; () where gaps are filled to their end.
      full_reason: why a text ends whose gaps are full: "length" where the number of tokens was a limit, else "stop".
      stops: texts that end it and are not part of it.
      shows_given: whether the text between and around the gaps is part of it.
      is_response: whether it is a chat's response: decoded on its own, without space around it.
      end_text: with `is_response`, what a response may end with and is omitted.
      shows_end: whether the token that ended the text is among the log-probabilities.
      needed: see `final_groups`.
      offset: what is added to the offsets of tokens.
    """

    segments: Sequence[Segment]
    gaps: Sequence[range]
    ends: Collection[int] = ()
    full_reason: str = "length"
    stops: tuple[str, ...] = ()
    shows_given: bool = False
    is_response: bool = False
    end_text: str = ""
    shows_end: bool = False
    needed: Sequence[int] = ()
    offset: int = 0


class Delta(NamedTuple):
    """What is new in a text, and why it ended: "stop", "length", or None while it goes on."""

    text: str
    log_probs: list[TokenLogProb]
    finish_reason: str | None


class RowText:
    """The text of a row while its gaps are filled.

    Attributes:
      text: what is certain so far; complete when `finish_reason` is set.
      num_tokens: tokens from the left that the text took so far, one that ended it included.
      num_passes: forward passes until then.
      gap_texts: the text of each gap that is complete.
    """

    def __init__(self, row: Sequence[int], text_format: TextFormat, texts: TokenTexts, *, top: bool = False):
        self._format, self._texts, self._top = text_format, texts, top
        self._final = FinalTokens(row, text_format.needed)
        self._raw = self.text = ""
        self._lead = 0
        self._held: list[tuple[int, TokenLogProb]] = []
        self.num_tokens = self.num_passes = 0
        self.gap_texts: list[str] = []
        self.finish_reason: str | None = None
        self._number = -1
        self._start_gap()

    @property
    def has_gaps(self) -> bool:
        return bool(self._format.gaps)

    def update(self, changes: Sequence[Change], step: int, *, is_last: bool) -> Delta:
        """Applies changes of the row; `step` is its number of forward passes after them."""
        before, log_probs = len(self.text), []
        for at_step, position in self._final.apply(changes, is_last=is_last):
            self.num_passes = max(self.num_passes, at_step)
            self._add(position)
            log_probs += self._released()
            if self.finish_reason:
                break
        if is_last and not self.finish_reason:
            self.num_passes = max(self.num_passes, step)
            self._end(self._format.full_reason)
            log_probs += self._released()
        return Delta(self.text[before:], log_probs, self.finish_reason)

    def _start_gap(self) -> None:
        """Moves on to the next gap, past the given text before it, or to the end of the row."""
        self._number += 1
        given = self._format.segments[2 * self._number] if 2 * self._number < len(self._format.segments) else ""
        if self._format.shows_given:
            self._raw += given
        if self._number < len(self._format.gaps):
            start = 0 if self._format.is_response else self._format.gaps[self._number].start
            self._gap = GapText(self._texts, self._final.tokens[:start], omit_space=given.endswith(" "))
            self.gap_texts.append("")
        self._show(is_complete=False)

    def _add(self, position: int) -> None:
        token = self._final.tokens[position]
        self.num_tokens += 1
        ends = token in self._format.ends
        if not ends or self._format.shows_end:
            text, log_prob = self._texts.text(token), finite(self._final.log_probs[position])
            self._held.append((len(self._raw), TokenLogProb(text, log_prob, ((text, log_prob),) if self._top else None,
                                                            self._format.offset + len(self._raw))))
        if ends:
            self._end("stop")
            return
        self._extend(self._gap.add(token))
        if position == self._format.gaps[self._number].stop - 1 and not self.finish_reason:
            self._extend(self._gap.finish())
            if not self.finish_reason:
                self._start_gap()

    def _extend(self, text: str) -> None:
        self._raw += text
        self.gap_texts[-1] += text
        self._show(is_complete=False)

    def _end(self, reason: str) -> None:
        if self._number < len(self._format.gaps):
            self._extend(self._gap.finish())
        if not self.finish_reason:
            self._show(is_complete=True)
        self.finish_reason = self.finish_reason or reason

    def _show(self, *, is_complete: bool) -> None:
        """Sets `text` to what is certain of the raw text."""
        text = self._raw
        if self._format.is_response:
            text = text.rstrip()
            end = self._format.end_text
            text = text.removesuffix(end) if is_complete else text[: len(text) - overlap(text, end)]
            self._lead = len(self._raw) - len(self._raw.lstrip())
            text = text.strip()
        found = [(start + len(stop), start) for stop in self._format.stops if (start := text.find(stop)) >= 0]
        if found:  # the stop string that was complete first, and the longest of several
            text, self.finish_reason = text[: min(found)[1]], "stop"
            self._held = [held for held in self._held if held[0] < self._lead + len(text)]
        elif not is_complete:
            text = text[: len(text) - max((overlap(text, stop) for stop in self._format.stops), default=0)]
        self.text = text

    def _released(self) -> list[TokenLogProb]:
        """Returns the log-probabilities of the tokens whose text is now certain, and no longer holds them."""
        shown = len(self._raw) + 1 if self.finish_reason else self._lead + len(self.text)
        count = sum(1 for _ in itertools.takewhile(lambda held: held[0] < shown, self._held))
        released, self._held = self._held[:count], self._held[count:]
        return [token for _, token in released]


def finite(log_prob: float) -> float:
    """Returns a log-probability that JSON can hold: at least -9999, OpenAI's least."""
    return max(float(log_prob), -9999.0)


def overlap(text: str, end: str) -> int:
    """Returns the length of the longest start of `end` that `text` ends with."""
    return next((size for size in range(min(len(text), len(end)), 0, -1) if text.endswith(end[:size])), 0)
