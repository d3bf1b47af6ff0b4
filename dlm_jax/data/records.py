"""Raw records on their way from a source to a tokenizer, and what can be wrong with one."""

import dataclasses
import json
from typing import Any

from dlm_jax.errors import DataError

Payload = bytes | str | dict[str, Any]  # a line of JSON not yet parsed, a text, or a record


class BadRecord(ValueError):
    """A record that cannot be used; the message is the reason alone."""


class BrokenSource(DataError):
    """A source that cannot be read from some record on."""


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Consecutive records of one source, as it gave them.

    Attributes:
      source: the file or dataset, as messages show it.
      unit: what the source counts its records in: "line", "item", "row", "document".
      first: the number of the first record, from 1.
      payloads: the records.
      broken: says that the source cannot be read from here on.
    """

    source: str
    unit: str
    first: int
    payloads: list[Payload]
    broken: str | None = None

    def where(self, number: int) -> str:
        return f"{self.source}, {self.unit} {number}"


def record_of(payload: Payload) -> str | dict[str, Any]:
    """The record of a payload: bytes are parsed as JSON, a blank line is an empty text.

    Raises:
      BadRecord: not JSON, or neither a text nor a record.
    """
    if isinstance(payload, bytes):
        try:
            payload = json.loads(payload) if payload.strip() else ""
        except ValueError as error:  # also not UTF-8
            raise BadRecord(f"not JSON ({error})") from error
    if not isinstance(payload, str | dict):
        raise BadRecord(f"{type(payload).__name__} where a text or a record was expected")
    return payload


def text_of(record: str | dict[str, Any], key: str) -> str:
    """A record's text: the record itself, or what it has under `key`.

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
