"""How far a preparation has come: what it counted, packed and wrote, so that it can go on from there."""

import dataclasses
import io
import json
import logging
from collections import Counter
from typing import Self

import numpy as np

from dlm_jax.data.encode import Encoded, Piece
from dlm_jax.data.packing import Packer
from dlm_jax.data.remote import read_file, write_file
from dlm_jax.data.shards import RowLayout, Shard, write_shard
from dlm_jax.errors import DataError

FILE = "progress.npz"
PARTS = ("train", "validation")
_BAD_RECORDS_KEPT = 100

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Mark:
    """So many sources have been read whole, and of the next so many records."""

    source: int = 0
    record: int = 0


class Progress:
    """Attributes:
    mark: how far the sources have been read.
    counts: documents and tokens of each part ("train.tokens"), bad records, and what the form counts.
    bad: where the first bad records are, and what is wrong with them.
    shards: the files of each part that are written.
    """

    def __init__(self, directory: str, identity: str, layout: RowLayout):
        self.directory, self.identity, self.layout = directory, identity, layout
        self.mark = Mark()
        self.counts: Counter = Counter()
        self.bad: list[str] = []
        self.shards: dict[str, list[Shard]] = {part: [] for part in PARTS}
        self._packers = {part: Packer(layout.length) for part in PARTS}
        self._pending: dict[str, list[np.ndarray]] = {part: [] for part in PARTS}

    @property
    def tokens(self) -> int:
        return sum(self.counts[f"{part}.tokens"] for part in PARTS)

    def absorb(self, encoded: Encoded, reached: Mark) -> None:
        """Takes in what the records up to `reached` became."""
        for problem in encoded.bad:
            self.counts["bad_records"] += 1
            if len(self.bad) < _BAD_RECORDS_KEPT:
                self.bad.append(problem)
                log.warning("left out: %s", problem)
            elif self.counts["bad_records"] == _BAD_RECORDS_KEPT + 1:
                log.warning("more bad records follow; they are counted, and no longer shown")
        for part, piece in encoded.parts.items():
            rows = self._packers[part].add(piece)
            if len(rows):
                self._pending[part].append(self.layout.encode(rows))
        self.counts.update(encoded.counts)
        self.mark = reached

    def pending_bytes(self, part: str) -> int:
        return sum(block.nbytes for block in self._pending[part])

    def flush(self, part: str) -> None:
        """Writes what is pending of a part as its next shard."""
        if self._pending[part]:
            file = f"{part}-{len(self.shards[part]):05d}.array_record"
            self.shards[part].append(write_shard(self.directory, file, self._pending[part]))
            self._pending[part] = []

    def save(self) -> None:
        facts = {"identity": self.identity, "mark": dataclasses.asdict(self.mark), "counts": self.counts,
                 "bad": self.bad, "shards": {part: list(map(dataclasses.asdict, shards))
                                             for part, shards in self.shards.items()}}
        arrays = {"facts": np.frombuffer(json.dumps(facts).encode(), np.uint8)}
        none = np.zeros((0, self.layout.row_bytes), np.uint8)
        for part in PARTS:
            arrays[f"{part}.tokens"] = self._packers[part].rest.tokens
            arrays[f"{part}.starts"] = self._packers[part].rest.starts
            arrays[f"{part}.pending"] = np.concatenate([none, *self._pending[part]])
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        write_file(f"{self.directory}/{FILE}", buffer.getvalue())

    @classmethod
    def load(cls, directory: str, identity: str, layout: RowLayout) -> Self:
        """What `save` left, or the very beginning.

        Raises:
          DataError: what was saved belongs to other rows, or is damaged.
        """
        progress = cls(directory, identity, layout)
        content = read_file(f"{directory}/{FILE}")
        if content is None:
            return progress
        try:
            with np.load(io.BytesIO(content)) as arrays:
                facts = json.loads(arrays["facts"].tobytes())
                if facts["identity"] != identity:
                    raise DataError(f"{directory} holds the beginning of rows of other sources, settings or another "
                                    "tokenizer; choose another directory, or remove this one")
                for part in PARTS:
                    progress._packers[part].rest = Piece(arrays[f"{part}.tokens"], arrays[f"{part}.starts"])
                    progress._pending[part] = [arrays[f"{part}.pending"]] if len(arrays[f"{part}.pending"]) else []
            progress.mark, progress.counts, progress.bad = Mark(**facts["mark"]), Counter(facts["counts"]), facts["bad"]
            progress.shards = {part: [Shard(**shard) for shard in facts["shards"][part]] for part in PARTS}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{directory}/{FILE} is damaged ({error}); remove {directory}, and begin again") from error
        return progress
