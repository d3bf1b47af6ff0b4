"""From chunks of raw records to pieces of tokens: what worker processes of `prepare` do."""

import dataclasses
import hashlib
from collections import Counter
from typing import Any, Protocol

import numpy as np

from dlm_jax.data.records import BadRecord, Chunk, record_of
from dlm_jax.errors import DataError


@dataclasses.dataclass(frozen=True)
class Piece:
    """Documents or examples laid end to end.

    Attributes:
      tokens: uint32 [tokens].
      starts: bool [tokens]; True where a document begins.
      maskable: bool [tokens], where a token may be noised and scored; None: everywhere.
    """

    tokens: np.ndarray
    starts: np.ndarray
    maskable: np.ndarray | None = None


class Form(Protocol):
    """What records hold, and how they become tokens. Picklable: workers get a copy."""

    columns: tuple[str, ...] | None  # the keys of a record that are read; None: all
    planes: tuple[str, ...]  # what its rows carry beside tokens, of `rows.PLANES`
    facts: list[Any]  # what else decides the tokens, beside settings and tokenizer; JSON can hold it

    def read(self, record: str | dict[str, Any]) -> tuple[str, Any] | None:
        """(the text whose hash decides whether it is held out, an item for `encode`); None for a blank record.

        Raises:
          BadRecord: the record cannot be used.
          DataError: it must not be left out silently, whatever the policy for bad records.
        """

    def encode(self, items: list[Any], counts: Counter) -> Piece:
        """The tokens of some items; what is worth counting is added to `counts`."""


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Attributes:
    parts: the piece of each part ("train", "validation") that got any document.
    counts: documents and tokens of each part, as "train.documents", and what the form counts.
    bad: of each record that cannot be used, where it is and why.
    """

    parts: dict[str, Piece]
    counts: Counter
    bad: list[str]


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Reads the records of a chunk, parts off what is held out, and tokenises; a pure function of the chunk."""

    form: Form
    validation_fraction: float = 0.0

    def __call__(self, chunk: Chunk) -> Encoded:
        items: dict[str, list] = {"train": [], "validation": []}
        bad = [chunk.broken] if chunk.broken else []
        for number, payload in enumerate(chunk.payloads, chunk.first):
            try:
                found = self.form.read(record_of(payload))
            except BadRecord as error:
                bad.append(f"{chunk.where(number)}: {error}")
                continue
            except DataError as error:
                raise DataError(f"{chunk.where(number)}: {error}") from error
            if found is not None:
                key, item = found
                items["validation" if is_held_out(key, self.validation_fraction) else "train"].append(item)
        counts: Counter = Counter()
        parts = {part: self.form.encode(held, counts) for part, held in items.items() if held}
        for part, piece in parts.items():
            counts[f"{part}.documents"] += len(items[part])
            counts[f"{part}.tokens"] += len(piece.tokens)
        return Encoded(parts, counts, bad)


def is_held_out(document: str, fraction: float) -> bool:
    """Whether a document is in the held-out part: by a hash of its text, whatever its neighbours."""
    if not fraction:
        return False
    digest = hashlib.blake2b(document.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64
