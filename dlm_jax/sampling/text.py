"""From rows of tokens and gaps to the rectangular arrays a sampler works on."""

import dataclasses
import itertools
import re
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Self

import numpy as np

from dlm_jax.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


GAP = -1  # stands for a token to be filled in
_BUCKET = 32


@dataclasses.dataclass(frozen=True)
class PaddedBatch:
    """Padded rows: `tokens` int32 and `fixed` bool [batch, length], and `lengths` int32 [batch].

    `coarse`: how wide the padding is, see `bucket`.
    """

    tokens: np.ndarray
    fixed: np.ndarray
    lengths: np.ndarray
    coarse: bool = False

    def take(self, rows: np.ndarray) -> Self:
        """The given rows, no wider than the bucket of the longest of them."""
        width = bucket(self.lengths[rows].max(), self.tokens.shape[1], coarse=self.coarse)
        return PaddedBatch(self.tokens[rows, :width], self.fixed[rows, :width], self.lengths[rows], self.coarse)


def bucket(length: int, max_length: int, multiple: int = _BUCKET, coarse: bool = False) -> int:
    """The padded length: a multiple of 32 or so, so that similar lengths share one compiled program.

    `coarse`: of long texts there are two lengths in each doubling, for texts that grow a little from call to call.
    """
    if coarse:
        multiple = max(multiple, (1 << int(length - 1).bit_length()) // 4)
    return min(-(-length // multiple) * multiple, max_length)


def pad_rows(rows: Sequence[Sequence[int]], max_length: int, coarse: bool = False) -> PaddedBatch:
    """Pads `rows` of token ids and GAPs to one bucketed length; `coarse` as in `bucket`.

    Raises:
      DataError: a row is longer than `max_length`, or its position 0, which is context, is a gap.
    """
    for number, row in enumerate(rows):
        if len(row) > max_length:
            raise DataError(f"text {number} has {len(row)} tokens, gaps included, and the model takes at most "
                            f"{max_length}; shorten the text or ask for fewer new tokens")
        if row[0] == GAP:
            raise DataError(f"text {number} begins with a gap; position 0 is context, put a BOS token there")
    lengths = np.array([len(row) for row in rows], np.int32)
    tokens = np.zeros((len(rows), bucket(lengths.max(), max_length, coarse=coarse)), np.int32)
    fixed = np.ones(tokens.shape, bool)
    for i, row in enumerate(rows):
        row = np.asarray(row, np.int32)
        fixed[i, : len(row)] = row != GAP
        tokens[i, : len(row)] = np.where(row == GAP, 0, row)
    return PaddedBatch(tokens, fixed, lengths, coarse)


# ---- Between text with gaps and rows of tokens, so that what the user wrote comes back character for character.


# Text that is kept, or a number of tokens to fill in, or the numbers it may be; text and gaps alternate, text first.
Segment = str | int | range

_MARK = re.compile(r"<mask(?::(\d+)(?:-(\d+))?)?>")


def split_gaps(text: str, gap_length: int) -> list[Segment]:
    """Cuts "The <mask:3> sat<mask>, <mask:2-8>." into ["The ", 3, " sat", gap_length, ", ", range(2, 9), "."].

    Raises:
      DataError: there is no mark, or one asks for no tokens, or its range is empty.
    """
    segments: list[Segment] = []
    end = 0
    for mark in _MARK.finditer(text):
        shortest = int(mark[1] or gap_length)
        longest = int(mark[2] or shortest)
        if min(shortest, longest) < 1:
            raise DataError(f"a gap of no tokens in {_excerpt(text)}; a gap has at least 1 token")
        if shortest > longest:
            raise DataError(f"the range of {mark[0]} in {_excerpt(text)} is empty; write <mask:{longest}-{shortest}>")
        segments += [text[end : mark.start()], shortest if shortest == longest else range(shortest, longest + 1)]
        end = mark.end()
    if not segments:
        raise DataError(f"no gap in {_excerpt(text)}; write <mask:8> where 8 tokens are to be filled in, or <mask:2-8> "
                        "where 2 to 8 are")
    return [*segments, text[end:]]


def encode(tokenizer: "PreTrainedTokenizerBase", segments: Sequence[Segment],
           bos_token_id: int) -> tuple[list[int], list[range]]:
    """A row that begins with BOS, a GAP for each token to fill in; and where in it each gap lies.

    A gap whose length is not settled is as long as it may be.

    Tokenizers join a space to the word after it. One that stands before a gap is therefore left to the gap, or the
    network would meet a lone space, which it hardly knows; `decode` sets it right.
    """
    row, gaps = [bos_token_id], []
    for number, segment in enumerate(segments):
        if not isinstance(segment, str):
            length = segment[-1] if isinstance(segment, range) else segment
            gaps.append(range(len(row), len(row) + length))
            row += [GAP] * length
            continue
        segment = segment.removesuffix(" ") if number + 1 < len(segments) else segment
        if segment:
            row += _tokens(tokenizer, segment) if number == 0 else _inner_tokens(tokenizer, segment)
    return row, gaps


def decode(tokenizer: "PreTrainedTokenizerBase", segments: Sequence[Segment], gaps: Sequence[range],
           filled: Sequence[int], stop_token_ids: Collection[int] = ()) -> str:
    """The pieces, with the text of `filled` where gaps were; a gap's text ends before the first of `stop_token_ids`.

    A gap's text is what its tokens add to the text of all tokens before them, because tokenizers treat the
    beginning of a text specially.
    """
    text, filled = list(segments), [int(token) for token in filled]
    for number, gap in enumerate(gaps):
        tokens = before_end(filled[gap.start : gap.stop], stop_token_ids)
        before, after = _text(tokenizer, filled[: gap.start]), _text(tokenizer, filled[: gap.start] + tokens)
        text[2 * number + 1] = _beyond(before, after).removeprefix(" " if segments[2 * number].endswith(" ") else "")
    return "".join(text)


def before_end(tokens: Sequence[int], stop_token_ids: Collection[int]) -> list[int]:
    """The tokens before the first of `stop_token_ids`; all of them where there is none."""
    return [int(token) for token in itertools.takewhile(lambda token: token not in stop_token_ids, tokens)]


def _tokens(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _inner_tokens(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Tokens of text that does not begin a text: without the space that sentencepiece puts there."""
    anchor = _tokens(tokenizer, "\n")
    tokens = _tokens(tokenizer, "\n" + text)
    return tokens[len(anchor) :] if tokens[: len(anchor)] == anchor else _tokens(tokenizer, text)


def _text(tokenizer: "PreTrainedTokenizerBase", tokens: Sequence[int]) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _beyond(before: str, after: str) -> str:
    """What `after` holds past the beginning that it shares with `before`."""
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(before, after, strict=False))
    return after[sum(1 for _ in pairs) :]


def _excerpt(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
