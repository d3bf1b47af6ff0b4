"""Documents of any length as rows of one length."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

_BLOCK = 1 << 20  # tokens held before their rows are handed on


def pack(
    documents: Iterable[Sequence[int]], length: int, *, eos: int, bos: int | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Lays documents end to end, EOS after each, and cuts the stream every `length` tokens.

    Yields blocks (tokens int32 [n, length], segment_ids int32 [n, length]). Segments are the documents' parts
    in a row, counted from 1; whoever wants no boundaries ignores them. The last, partial row is dropped.
    """
    pieces: list[np.ndarray] = []
    starts: list[int] = []
    held = 0
    for document in documents:
        starts.append(held)
        head = () if bos is None else (bos,)
        pieces.append(np.asarray((*head, *document, eos), np.int32))
        held += len(pieces[-1])
        if held >= max(_BLOCK, length):
            tokens, segment_ids, rest = _cut(pieces, starts, length)
            yield tokens, segment_ids
            pieces, starts, held = [rest], [], len(rest)
    if held >= length:
        yield _cut(pieces, starts, length)[:2]


def _cut(pieces: list[np.ndarray], starts: list[int], length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    stream = np.concatenate(pieces)
    starting = np.zeros(len(stream), bool)
    starting[starts] = True
    whole = len(stream) // length * length
    starting = starting[:whole].reshape(-1, length)
    starting[:, 0] = True
    return stream[:whole].reshape(-1, length), np.cumsum(starting, axis=1, dtype=np.int32), stream[whole:]


def positions_of(segment_ids: np.ndarray) -> np.ndarray:
    """Positions that restart at 0 with each segment; int32 [batch, length] from int [batch, length]."""
    index = np.arange(segment_ids.shape[1], dtype=np.int32)
    starting = np.diff(segment_ids, axis=1, prepend=-1) != 0
    return index - np.maximum.accumulate(np.where(starting, index, 0), axis=1)
