"""Between text with gaps and rows of tokens, so that what the user wrote comes back character for character."""

import itertools
import re
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from dlm_jax.errors import DataError
from dlm_jax.sampling.canvas import GAP

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Text that is kept, or a number of tokens to fill in, or the numbers it may be; text and gaps alternate, text first.
Piece = str | int | range

_MARK = re.compile(r"<mask(?::(\d+)(?:-(\d+))?)?>")


def split_gaps(text: str, gap_length: int) -> list[Piece]:
    """Cuts "The <mask:3> sat<mask>, <mask:2-8>." into ["The ", 3, " sat", gap_length, ", ", range(2, 9), "."].

    Raises:
      DataError: there is no mark, or one asks for no tokens, or its range is empty.
    """
    pieces: list[Piece] = []
    end = 0
    for mark in _MARK.finditer(text):
        shortest = int(mark[1] or gap_length)
        longest = int(mark[2] or shortest)
        if min(shortest, longest) < 1:
            raise DataError(f"a gap of no tokens in {_excerpt(text)}; a gap has at least 1 token")
        if shortest > longest:
            raise DataError(f"the range of {mark[0]} in {_excerpt(text)} is empty; write <mask:{longest}-{shortest}>")
        pieces += [text[end : mark.start()], shortest if shortest == longest else range(shortest, longest + 1)]
        end = mark.end()
    if not pieces:
        raise DataError(f"no gap in {_excerpt(text)}; write <mask:8> where 8 tokens are to be filled in, or <mask:2-8> "
                        "where 2 to 8 are")
    return [*pieces, text[end:]]


def encode(tokenizer: "PreTrainedTokenizerBase", pieces: Sequence[Piece],
           bos_token_id: int) -> tuple[list[int], list[range]]:
    """A row that begins with BOS, a GAP for each token to fill in; and where in it each gap lies.

    A gap whose length is not settled is as long as it may be.

    Tokenizers join a space to the word after it. One that stands before a gap is therefore left to the gap, or the
    network would meet a lone space, which it hardly knows; `decode` sets it right.
    """
    row, gaps = [bos_token_id], []
    for number, piece in enumerate(pieces):
        if not isinstance(piece, str):
            length = piece[-1] if isinstance(piece, range) else piece
            gaps.append(range(len(row), len(row) + length))
            row += [GAP] * length
            continue
        piece = piece.removesuffix(" ") if number + 1 < len(pieces) else piece
        if piece:
            row += _tokens(tokenizer, piece) if number == 0 else _inner_tokens(tokenizer, piece)
    return row, gaps


def decode(tokenizer: "PreTrainedTokenizerBase", pieces: Sequence[Piece], gaps: Sequence[range],
           filled: Sequence[int], stop_token_ids: Collection[int] = ()) -> str:
    """The pieces, with the text of `filled` where gaps were; a gap's text ends before the first of `stop_token_ids`.

    A gap's text is what its tokens add to the text of all tokens before them, because tokenizers treat the
    beginning of a text specially.
    """
    text, filled = list(pieces), [int(token) for token in filled]
    for number, gap in enumerate(gaps):
        tokens = before_end(filled[gap.start : gap.stop], stop_token_ids)
        before, after = _text(tokenizer, filled[: gap.start]), _text(tokenizer, filled[: gap.start] + tokens)
        text[2 * number + 1] = _beyond(before, after).removeprefix(" " if pieces[2 * number].endswith(" ") else "")
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
