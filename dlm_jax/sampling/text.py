"""Text with gaps to rows of tokens and back, rows to padded arrays, and what tokens add to a text.

What the user wrote comes back character for character.
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Self

import numpy as np

from dlm_jax.data.tokenization import is_rendered, prepend_start, tokenize
from dlm_jax.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GAP = -1  # a token that is still to be sampled
# Given text, or the number of tokens in a gap, or the numbers it may have; text and gaps alternate, text first.
Segment = str | int | range

BROKEN = "\N{REPLACEMENT CHARACTER}"  # how an incomplete character decodes
_BUCKET = 32
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_MAX_CHARACTER_TOKENS = 8
_MASK_PATTERN = re.compile(r"<mask(?::(\d+)(?:-(\d+))?)?>")


def split_gaps(text: str, gap_length: int) -> list[Segment]:
    """Splits "The <mask:3> sat<mask>, <mask:2-8>." into ["The ", 3, " sat", gap_length, ", ", range(2, 9), "."].

    Raises:
      DataError: there is no gap, or a gap has no tokens, or its range is empty.
    """
    segments: list[Segment] = []
    end = 0
    for match in _MASK_PATTERN.finditer(text):
        shortest = int(match[1] or gap_length)
        longest = int(match[2] or shortest)
        if min(shortest, longest) < 1:
            raise DataError(f"a gap of 0 tokens in {_excerpt(text)}; a gap has at least 1 token")
        if shortest > longest:
            raise DataError(f"the range of {match[0]} in {_excerpt(text)} is empty; write <mask:{longest}-{shortest}>")
        segments += [text[end : match.start()], shortest if shortest == longest else range(shortest, longest + 1)]
        end = match.end()
    if not segments:
        raise DataError(f"no gap in {_excerpt(text)}; write <mask:8> for a gap of 8 tokens, or <mask:2-8> for 2 to 8")
    return [*segments, text[end:]]


def encode(tokenizer: "PreTrainedTokenizerBase", segments: Sequence[Segment],
           start: int) -> tuple[list[int], list[range]]:
    """Returns the tokens of the segments from position 0, a GAP for each token to be sampled, and the gaps' positions.

    Special tokens are read only in what a chat template has written, see `tokenization.is_rendered`. A gap of unknown
    length gets its longest. Tokenizers join a space to the next word, so a space before a gap is not encoded: the
    network rarely sees a single space. `decode` puts it back.

    Args:
      start: the token of position 0, which precedes the text.
    """
    rendered = isinstance(segments[0], str) and is_rendered(tokenizer, segments[0])
    row, gaps = [start], []
    for number, segment in enumerate(segments):
        if not isinstance(segment, str):
            length = segment[-1] if isinstance(segment, range) else segment
            gaps.append(range(len(row), len(row) + length))
            row += [GAP] * length
            continue
        segment = segment.removesuffix(" ") if number + 1 < len(segments) else segment
        if number == 0:
            tokens, = tokenize(tokenizer, [segment], special_tokens=rendered)
            row = prepend_start(tokenizer, start, tokens, rendered=rendered)
        elif segment:
            row += _inner_tokens(tokenizer, segment, special_tokens=rendered)
    return row, gaps


def decode(tokenizer: "PreTrainedTokenizerBase", segments: Sequence[Segment], gaps: Sequence[range],
           filled: Sequence[int], stop_token_ids: Collection[int] = ()) -> str:
    """Returns the segments with the text of `filled` in the gaps, each up to the first of `stop_token_ids`.

    A gap's text is what its tokens add to the text of all earlier tokens, because tokenizers treat the start of a text
    specially.
    """
    text, filled = list(segments), [int(token) for token in filled]
    for number, gap in enumerate(gaps):
        tokens = before_end(filled[gap.start : gap.stop], stop_token_ids)
        before, after = (tokenizer.decode(row, skip_special_tokens=True, clean_up_tokenization_spaces=False)
                         for row in (filled[: gap.start], filled[: gap.start] + tokens))
        added = text_after(after, before)
        text[2 * number + 1] = added.removeprefix(" ") if segments[2 * number].endswith(" ") else added
    return "".join(text)


def text_after(text: str, start: str) -> str:
    """Returns what follows in `text` after its common prefix with `start`."""
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(text, start, strict=False))
    return text.removeprefix(start) if text.startswith(start) else text[sum(1 for _ in same) :]


def before_end(tokens: Sequence[int], stop_token_ids: Collection[int]) -> list[int]:
    """Returns the tokens before the first of `stop_token_ids`; all of them where there is none."""
    return [int(token) for token in itertools.takewhile(lambda token: token not in stop_token_ids, tokens)]


class TokenTexts:
    """What tokens add to a text; each is computed once."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase"):
        self.tokenizer = tokenizer
        self._before, = tokenize(tokenizer, ["a"])
        self._known = self.decode(self._before)
        self.text = functools.cache(self._text)
        self.is_special = frozenset(tokenizer.all_special_ids).__contains__
        self.is_byte = functools.cache(self._is_byte)
        self.is_anchor = functools.cache(self._is_anchor)

    def decode(self, tokens: Sequence[int]) -> str:
        """Returns the text of tokens, as `decode` does."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def added(self, tokens: Sequence[int]) -> str:
        """Returns what tokens add to an earlier text."""
        return text_after(self.decode([*self._before, *tokens]), self._known)

    def joined(self, tokens: Sequence[int]) -> list[tuple[int, int, str]]:
        """Returns the characters that several tokens of a row spell: first position, number of tokens, character."""
        found, position = [], 0
        while position < len(tokens):
            count = 1
            if tokens[position] != GAP and BROKEN in self.text(tokens[position]):
                end = position + _MAX_CHARACTER_TOKENS
                count, text = self._first_character(before_end(tokens[position:end], (GAP,)))
                if count > 1:
                    found.append((position, count, text))
            position += count
        return found

    def _first_character(self, tokens: Sequence[int]) -> tuple[int, str]:
        """Returns the fewest of the first tokens that decode to complete characters, and their text; 1 if none do."""
        for count in range(2, len(tokens) + 1):
            text = self.added(tokens[:count])
            if BROKEN not in text:
                return count, text
        return 1, ""

    def _text(self, token: int) -> str:
        """Returns what a token adds, the space before a word included; the name of a special token."""
        if self.is_special(token):
            return self.tokenizer.convert_ids_to_tokens(token)
        return self.added([token]) or f"<{token}>"

    def _is_byte(self, token: int) -> bool:
        """Returns whether a token is a byte, which SentencePiece decodes together with the bytes around it.

        Special tokens between them make no difference.
        """
        return _BYTE.fullmatch(self.tokenizer.convert_ids_to_tokens(token) or "") is not None

    def _is_anchor(self, token: int) -> bool:
        """Returns whether the text after this token does not depend on the tokens before it."""
        return not self.is_byte(token) and BROKEN not in (text := self.decode([token])) and bool(text.strip())


@dataclasses.dataclass(frozen=True)
class PaddedBatch:
    """Padded rows.

    Attributes:
      tokens: int32 [batch, length], 0 in gaps and padding.
      fixed: bool [batch, length], False in gaps.
      lengths: int32 [batch].
      coarse: see `bucket`.
    """

    tokens: np.ndarray
    fixed: np.ndarray
    lengths: np.ndarray
    coarse: bool = False

    def take(self, rows: np.ndarray) -> Self:
        """Returns the given rows, as wide as the bucket of the longest of them."""
        width = bucket(self.lengths[rows].max(), self.tokens.shape[1], coarse=self.coarse)
        return PaddedBatch(self.tokens[rows, :width], self.fixed[rows, :width], self.lengths[rows], self.coarse)


def bucket(length: int, max_length: int, multiple: int = _BUCKET, coarse: bool = False) -> int:
    """Returns the padded length: a multiple of 32 or so, so that similar lengths share one compiled program.

    With `coarse` there are at most two lengths per doubling, for texts that grow a little from call to call.
    """
    if coarse:
        multiple = max(multiple, (1 << int(length - 1).bit_length()) // 4)
    return min(-(-length // multiple) * multiple, max_length)


def pad_rows(rows: Sequence[Sequence[int]], max_length: int, coarse: bool = False) -> PaddedBatch:
    """Pads `rows` of token ids and GAPs to one bucketed length; `coarse` as in `bucket`.

    Raises:
      DataError: a row is longer than `max_length`, or has a gap at position 0, which is context.
    """
    for number, row in enumerate(rows):
        if len(row) > max_length:
            raise DataError(f"text {number} has {len(row)} tokens, gaps included, and the model takes at most "
                            f"{max_length}; shorten the text or ask for fewer new tokens")
        if row[0] == GAP:
            raise DataError(f"text {number} starts with a gap, but position 0 is context; put a BOS token there")
    lengths = np.array([len(row) for row in rows], np.int32)
    tokens = np.zeros((len(rows), bucket(lengths.max(), max_length, coarse=coarse)), np.int32)
    for padded, row in zip(tokens, rows, strict=True):
        padded[: len(row)] = row
    fixed = tokens != GAP
    return PaddedBatch(np.where(fixed, tokens, 0), fixed, lengths, coarse)


def _inner_tokens(tokenizer: "PreTrainedTokenizerBase", text: str, *, special_tokens: bool) -> list[int]:
    """Returns the tokens of text inside a longer one: without the space that SentencePiece puts at a start."""
    anchor, tokens, alone = tokenize(tokenizer, ["\n", "\n" + text, text], special_tokens=special_tokens)
    return tokens[len(anchor) :] if tokens[: len(anchor)] == anchor else alone


def _excerpt(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
