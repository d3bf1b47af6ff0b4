"""Raw records, and how workers turn chunks of them into spans of tokens with the model's own tokenizer."""

import array
import dataclasses
import hashlib
import json
from collections import Counter
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from dlm_jax.data.rows import TokenSpan
from dlm_jax.data.tokenization import tokenize
from dlm_jax.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RawRecord = bytes | str | dict[str, Any]  # a line of JSON not yet parsed, a text, or a record


class BadRecord(ValueError):
    """A record that cannot be used; the message is the reason alone."""


class BrokenSource(DataError):
    """A source that cannot be read from some record on."""


@dataclasses.dataclass(frozen=True)
class RecordChunk:
    """Consecutive raw records of one source.

    Attributes:
      source: the file or dataset, as messages show it.
      unit: what the source calls its records: "line", "item", "row", "document", "example".
      first: the number of the first record, from 1.
      records: the raw records.
      error: why the source cannot be read after these records; None if it can.
    """

    source: str
    unit: str
    first: int
    records: list[RawRecord]
    error: str | None = None

    def location(self, number: int) -> str:
        """Returns the place of a record, as messages show it."""
        return f"{self.source}, {self.unit} {number}"


def parse_record(record: RawRecord) -> str | dict[str, Any]:
    """Returns a text or a dict: bytes are parsed as JSON, a blank line is an empty text.

    Raises:
      BadRecord: not JSON, or neither a text nor a dict.
    """
    if isinstance(record, bytes):
        try:
            record = json.loads(record) if record.strip() else ""
        except ValueError as error:  # also not UTF-8
            raise BadRecord(f"not JSON ({error})") from error
    if not isinstance(record, str | dict):
        raise BadRecord(f"{type(record).__name__} where a text or a record was expected")
    return record


def get_text(record: str | dict[str, Any], key: str) -> str:
    """Returns a record's text: the record itself, or its value under `key`.

    Raises:
      BadRecord: there is none, or it is not valid Unicode.
    """
    if isinstance(record, dict):
        if key not in record:
            raise BadRecord(f"no key {key!r} (it has {', '.join(map(str, record))})")
        record = record[key]
    if not isinstance(record, str):
        raise BadRecord(f"{type(record).__name__} under {key!r} where text was expected")
    try:
        record.encode()
    except UnicodeEncodeError as error:  # JSON can escape half a surrogate pair
        raise BadRecord(f"not valid Unicode ({error.reason})") from error
    return record


class RecordEncoder(Protocol):
    """Turns records into tokens. Picklable: each worker gets a copy."""

    columns: tuple[str, ...] | None  # the keys of a record that are read; None: all
    row_masks: tuple[str, ...]  # the masks of its rows beside the tokens, of `rows.ROW_MASKS`
    facts: list[Any]  # what else decides the tokens, beside settings and tokenizer; serializable as JSON

    def parse(self, record: str | dict[str, Any]) -> tuple[str, Any] | None:
        """Returns (the text whose hash decides whether it is held out, an item for `encode`); None if it is blank.

        Raises:
          BadRecord: the record cannot be used.
          DataError: it must not be skipped silently, whatever the policy for bad records.
        """

    def encode(self, items: list[Any], counts: Counter) -> TokenSpan:
        """Returns the tokens of some items and adds statistics to `counts`."""


@dataclasses.dataclass(frozen=True)
class EncodedChunk:
    """The tokens of a chunk of records.

    Attributes:
      spans: the tokens of each split ("train", "validation") that got any document.
      counts: documents and tokens of each split, as "train.documents", and the encoder's own statistics.
      bad: where each bad record is, and why it cannot be used.
    """

    spans: dict[str, TokenSpan]
    counts: Counter
    bad: list[str]


@dataclasses.dataclass(frozen=True)
class ChunkEncoder:
    """Parses the records of a chunk, assigns them to splits, and tokenizes them; a pure function of the chunk."""

    encoder: RecordEncoder
    validation_fraction: float = 0.0

    def __call__(self, chunk: RecordChunk) -> EncodedChunk:
        items: dict[str, list] = {"train": [], "validation": []}
        bad = [chunk.error] if chunk.error else []
        for number, raw in enumerate(chunk.records, chunk.first):
            try:
                parsed = self.encoder.parse(parse_record(raw))
            except BadRecord as error:
                bad.append(f"{chunk.location(number)}: {error}")
                continue
            except DataError as error:
                raise DataError(f"{chunk.location(number)}: {error}") from error
            if parsed is not None:
                key, item = parsed
                items["validation" if is_held_out(key, self.validation_fraction) else "train"].append(item)
        counts: Counter = Counter()
        spans = {split: self.encoder.encode(found, counts) for split, found in items.items() if found}
        for split, span in spans.items():
            counts[f"{split}.documents"] += len(items[split])
            counts[f"{split}.tokens"] += len(span.tokens)
        return EncodedChunk(spans, counts, bad)


def is_held_out(document: str, fraction: float) -> bool:
    """Returns whether a document belongs to the validation split, decided by a hash of its text alone."""
    if not fraction:
        return False
    digest = hashlib.blake2b(document.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


@dataclasses.dataclass(frozen=True)
class TextEncoder:
    """A `RecordEncoder` of running text: the tokens of each document, EOS, and perhaps BOS before them."""

    tokenizer: "PreTrainedTokenizerBase"
    text_key: str
    bos: int | None
    eos: int
    row_masks: tuple[str, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.text_key,)

    @property
    def facts(self) -> list[int | None]:
        return [self.bos, self.eos]

    def parse(self, record: str | dict[str, Any]) -> tuple[str, str] | None:
        text = get_text(record, self.text_key)
        return (text, text) if text.strip() else None

    def encode(self, items: list[str], counts: Counter) -> TokenSpan:
        tokens, first = array.array("I"), []
        prefix = [] if self.bos is None else [self.bos]
        for ids in tokenize(self.tokenizer, items):
            first.append(len(tokens))
            tokens.fromlist([*prefix, *ids, self.eos])
        starts = np.zeros(len(tokens), bool)
        starts[first] = True
        return TokenSpan(np.frombuffer(tokens, np.uint32), starts)
