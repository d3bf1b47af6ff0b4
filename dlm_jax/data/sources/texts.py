"""Text files, read in one go from the front: plain text, JSON lines, a JSON list."""

import codecs
import io
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import BinaryIO

from dlm_jax.data.records import Payload
from dlm_jax.data.sources.files import File, FileSource

_BLOCK = 1 << 20
_BOM = b"\xef\xbb\xbf"


class _Stream(FileSource):
    """A file, perhaps compressed, whose records come one after the other."""

    _raw: BinaryIO | None = None
    _reached = 0

    def done(self) -> int:
        if self._raw and not self._raw.closed:
            self._reached = self._raw.tell()
        return self._reached

    def _read(self, start: int, columns: Sequence[str] | None) -> Iterator[Payload]:
        with self.file.open() as self._raw:
            yield from itertools.islice(self._parse(self.file.decompress(self._raw)), start, None)
        self._reached = self.size or self._reached

    def _parse(self, stream: BinaryIO) -> Iterator[Payload]:
        raise NotImplementedError


class TextSource(_Stream):
    """Plain text, parted into documents at `separator`; empty: the file is one document."""

    unit = "document"

    def __init__(self, file: File, separator: str = ""):
        super().__init__(file)
        self._separator = separator

    def _parse(self, stream: BinaryIO) -> Iterator[str]:
        blocks = _decoded(stream)
        if self._separator:
            yield from split(blocks, self._separator)
        elif whole := "".join(blocks):
            yield whole


class LineSource(_Stream):
    """JSON lines. They are given as they stand, blank ones too, so that whoever parses them can do so in parallel."""

    unit = "line"

    def _parse(self, stream: BinaryIO) -> Iterator[bytes]:
        return iter(stream)


class JsonSource(_Stream):
    """A .json file: a list of values, or one value a line after all."""

    unit = "line"  # as long as nothing has been read

    def _parse(self, stream: BinaryIO) -> Iterator[Payload]:
        head = b""
        while byte := stream.read(1):
            head += byte
            if not (byte.isspace() or byte in _BOM):
                break
        if head.endswith(b"["):
            self.unit = "item"
            yield from json.loads(head + stream.read())
        else:
            yield from itertools.chain(io.BytesIO(head + stream.readline()), stream)


def _decoded(stream: BinaryIO) -> Iterator[str]:
    """UTF-8 as it comes, so that what stands before damage is not lost; line ends become "\\n"."""
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8-sig")(), translate=True)
    while block := stream.read1(_BLOCK):
        yield decoder.decode(block)
    yield decoder.decode(b"", final=True)


def split(blocks: Iterable[str], separator: str) -> Iterator[str]:
    """The parts between separators of a text that comes in blocks, as `str.split` gives them but for an empty last one.
    """
    held: list[str] = []  # the beginning of a part; its end, which may begin a separator, is the tail
    tail = ""
    for block in blocks:
        part, *others = (tail + block).split(separator)
        if others:
            yield "".join(held) + part
            yield from others[:-1]
            held, part = [], others[-1]
        cut = max(len(part) - len(separator) + 1, 0)
        held.append(part[:cut])
        tail = part[cut:]
    if last := "".join(held) + tail:
        yield last
