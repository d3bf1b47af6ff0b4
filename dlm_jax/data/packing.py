"""Documents of any length as rows of one length."""

import numpy as np

from dlm_jax.data.encode import Piece
from dlm_jax.data.rows import Rows


class Packer:
    """Lays pieces end to end and cuts the stream every `length` tokens; what is left over begins the next row."""

    def __init__(self, length: int, rest: Piece | None = None):
        self.length = length
        self.rest = rest or Piece(np.zeros(0, np.uint32), np.zeros(0, bool))

    def add(self, piece: Piece) -> Rows:
        """The rows that `piece` completes, perhaps none."""
        tokens = np.concatenate([self.rest.tokens, piece.tokens])
        starts = np.concatenate([self.rest.starts, piece.starts])
        # Only examples carry `maskable`, and those fill whole rows, so that nothing of them is ever left over.
        maskable = piece.maskable
        whole = len(tokens) // self.length * self.length
        self.rest = Piece(tokens[whole:], starts[whole:])
        rows = starts[:whole].reshape(-1, self.length)
        rows[:, 0] = True
        return Rows(tokens[:whole].reshape(-1, self.length), rows,
                    None if maskable is None else maskable.reshape(-1, self.length))


def segments_of(starts: np.ndarray) -> np.ndarray:
    """Segments counted from 1 in each row; int32 [batch, length] from bool [batch, length]."""
    return np.cumsum(starts, axis=1, dtype=np.int32)


def positions_of(starts: np.ndarray) -> np.ndarray:
    """Positions that restart at 0 with each segment; int32 [batch, length] from bool [batch, length]."""
    index = np.arange(starts.shape[1], dtype=np.int32)
    return index - np.maximum.accumulate(np.where(starts, index, 0), axis=1)
