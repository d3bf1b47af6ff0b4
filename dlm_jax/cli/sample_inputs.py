"""The file that `dlm sample --prompts` reads: a text to continue or to fill in on each line."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Collection
from typing import Any

from dlm_jax.errors import DataError
from dlm_jax.sampling.text import Segment, split_gaps

KINDS = ("prompt", "infill")


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Attributes:
    kind: "prompt" or "infill", under which key each record has its text.
    records: the objects of the file, in order.
    lines: the number of the line on which each stands.
    digest: of the file's content.
    room: how many tokens are wanted, by the name that the method for this kind gives it.
    """

    path: str
    kind: str
    records: list[dict[str, Any]]
    lines: list[int]
    digest: str
    room: dict[str, int]

    def text(self, number: int) -> str:
        return self.records[number][self.kind]

    def segments(self, number: int) -> list[Segment]:
        """The text of a record and the tokens wanted in it, as `sampling.text` has them."""
        text = self.text(number)
        return split_gaps(text, **self.room) if self.kind == "infill" else [text, self.room["max_new_tokens"]]


def read_inputs(path: str, *, max_new_tokens: int, gap_length: int, taken: Collection[str] = ("text",)) -> Inputs:
    """Reads a .jsonl file of objects or texts, or a .txt file of prompts; empty lines count for nothing.

    Args:
      max_new_tokens, gap_length: tokens wanted after a prompt, and in a gap of no stated length.
      taken: keys that the output needs for itself.

    Raises:
      DataError: there is no such file, it holds nothing, or a line is not what it should be.
    """
    file = pathlib.Path(path)
    if file.suffix.lower() not in (".jsonl", ".txt"):
        raise DataError(f"{path} is neither .jsonl, on each line an object with a prompt or an infill, nor .txt, on "
                        "each line a prompt; give one of these")
    if not file.is_file():
        raise DataError(f"there is no file {path}")
    content = file.read_bytes()
    records, lines = [], []
    for line, raw in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not raw.strip():
            continue
        try:
            records.append(_record(raw, file.suffix.lower() == ".txt", taken))
        except ValueError as error:
            raise DataError(f"{path}, line {line}: {error}") from error
        lines.append(line)
        kind = _kind(records[0])
        if _kind(records[-1]) != kind:
            raise DataError(f"{path}, line {line}: an infill and a prompt do not go into one file, and line {lines[0]} "
                            f"has {'an' if kind == 'infill' else 'a'} {kind}; sort them into two")
    if not records:
        raise DataError(f"{path} is empty; write a text on each line")
    room = {"gap_length": gap_length} if kind == "infill" else {"max_new_tokens": max_new_tokens}
    return Inputs(path, kind, records, lines, hashlib.sha256(content).hexdigest(), room)


def _kind(record: dict[str, Any]) -> str:
    return next(kind for kind in KINDS if kind in record)


def _record(raw: bytes, plain: bool, taken: Collection[str]) -> dict[str, Any]:
    """The object a line stands for; a ValueError says what is wrong with it."""
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise ValueError("it is not UTF-8; convert the file") from error
    if plain:
        return {"prompt": text.removesuffix("\r")}
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON ({error.msg} at character {error.colno}); write an object such as "
                         '{"prompt": "Once"}') from error
    record = {"prompt": record} if isinstance(record, str) else record
    if not isinstance(record, dict):
        raise ValueError('it is neither an object nor a text; write an object such as {"prompt": "Once"}')
    kinds = [kind for kind in KINDS if kind in record]
    if len(kinds) != 1:
        raise ValueError(f"it has {'both' if kinds else 'neither'} a prompt {'and' if kinds else 'nor'} an infill; "
                         "give it one of the two")
    if not isinstance(record[kinds[0]], str):
        raise ValueError(f"its {kinds[0]} is no text; put it in quotes")
    for key in taken:
        if key in record:
            raise ValueError(f"the key {key!r} is what the output adds; give it another name")
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError("it holds half a character (a lone surrogate); remove it") from error
    if kinds == ["infill"]:
        try:
            split_gaps(record["infill"], 1)
        except DataError as error:
            raise ValueError(str(error)) from error
    return record
