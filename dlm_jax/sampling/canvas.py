"""From rows of tokens and gaps to the rectangular arrays a sampler works on."""

import dataclasses
from collections.abc import Sequence
from typing import Self

import numpy as np

from dlm_jax.errors import DataError

GAP = -1  # stands for a token to be filled in
_BUCKET = 32


@dataclasses.dataclass(frozen=True)
class Canvas:
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
        return Canvas(self.tokens[rows, :width], self.fixed[rows, :width], self.lengths[rows], self.coarse)


def bucket(length: int, max_length: int, multiple: int = _BUCKET, coarse: bool = False) -> int:
    """The padded length: a multiple of 32 or so, so that similar lengths share one compiled program.

    `coarse`: of long texts there are two lengths in each doubling, for texts that grow a little from call to call.
    """
    if coarse:
        multiple = max(multiple, (1 << int(length - 1).bit_length()) // 4)
    return min(-(-length // multiple) * multiple, max_length)


def make_canvas(rows: Sequence[Sequence[int]], max_length: int, coarse: bool = False) -> Canvas:
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
    return Canvas(tokens, fixed, lengths, coarse)
