"""From sources to prepared rows: reads, tokenizes in parallel, packs, and writes shards; resumes after an interruption.

One process reads and packs, in one order; workers parse and tokenize. The rows therefore depend on the sources, the
tokenizer and the settings alone, not on the number of workers or on interruptions.
"""

import contextlib
import dataclasses
import io
import json
import logging
import multiprocessing
import os
import signal
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from tqdm import tqdm

from dlm_jax.data.config import RowsConfig
from dlm_jax.data.manifest import Manifest, Split, read_manifest, rows_identity
from dlm_jax.data.prompts import PromptFormat
from dlm_jax.data.records import (
    BrokenSource,
    ChunkEncoder,
    EncodedChunk,
    RecordChunk,
    RecordEncoder,
    TextEncoder,
)
from dlm_jax.data.rows import RowPacker, TokenSpan
from dlm_jax.data.shards import RowLayout, Shard, write_shard
from dlm_jax.data.source_files import Source
from dlm_jax.data.sources import read_chunks
from dlm_jax.data.tokenization import boundary_tokens, id_limit, start_token, tokenizer_fingerprint
from dlm_jax.errors import DataError
from dlm_jax.storage import make_directory, read_file, remove_file, write_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROGRESS_FILE = "progress.npz"
SHARD_BYTES = 64 << 20
SPLITS = ("train", "validation")
_SAVE_SECONDS = 60  # at most this much computation is lost by an interruption
_BAD_RECORDS_KEPT = 100
_CHUNKS_PER_WORKER = 3  # in flight at a time

log = logging.getLogger(__name__)


def prepare(sources: Sequence[Source], directory: str, tokenizer: "PreTrainedTokenizerBase", config: RowsConfig, *,
            workers: int = 0, shard_bytes: int = SHARD_BYTES, note: str = "") -> Manifest:
    """Writes the rows of `sources` and their manifest into `directory`, unless they are there already.

    Args:
      directory: local or on an object store; the manifest, written last, shows that it is complete.
      workers: processes that tokenize; 0: this one does.
      shard_bytes: approximate size of a file.
      note: kept in the manifest, for instance a license.

    Raises:
      DataError: a source cannot be read, a record is bad and `config.on_bad_record` is "raise", the sources hold
        nothing, or `directory` holds other rows or cannot be written.
    """
    encoder = make_encoder(tokenizer, config)
    identity = rows_identity(sources, tokenizer, config, encoder)
    if found := read_manifest(directory):
        if found.identity != identity:
            raise DataError(f"{directory} holds rows of other sources, settings or another tokenizer; choose another "
                            "directory, or remove this one")
        return found
    layout = RowLayout.for_vocab(config.length, id_limit(tokenizer), encoder.row_masks)
    make_directory(directory)
    progress = Progress.load(directory, identity, layout)
    skip, saved = config.on_bad_record == "skip", time.monotonic()
    with ordered_map(ChunkEncoder(encoder, config.validation_fraction), workers) as encode, _bar(sources) as bar:
        for (cursor, consumed), encoded in encode(_read(sources, progress.cursor, encoder.columns, skip)):
            if encoded.bad and not skip:
                raise DataError(f"{encoded.bad[0]}; set data.on_bad_record to skip to skip such records")
            progress.add(encoded, cursor)
            bar.set_postfix_str(f"{progress.tokens / 1e6:,.1f}M tokens", refresh=False)
            bar.update(consumed - bar.n)
            full = progress.pending_bytes("train") >= shard_bytes
            if full:
                progress.flush("train")
            if full or time.monotonic() - saved > _SAVE_SECONDS:
                progress.save()
                saved = time.monotonic()
    if not progress.tokens:
        raise DataError(_no_text(sources, progress))
    for split in SPLITS:
        progress.flush(split)
    manifest = Manifest(
        directory=directory, identity=identity, layout=layout, settings=dataclasses.asdict(config), note=note,
        tokenizer={"name": tokenizer.name_or_path, "fingerprint": tokenizer_fingerprint(tokenizer),
                   "vocab_size": len(tokenizer)},
        sources=tuple(source.name for source in sources),
        splits={split: progress.summary(split) for split in SPLITS if split == "train" or config.validation_fraction},
        counts={name: count for name, count in sorted(progress.counts.items()) if "." not in name},
        bad_records=tuple(progress.bad))
    manifest.write()
    remove_file(f"{directory}/{PROGRESS_FILE}")
    return manifest


def make_encoder(tokenizer: "PreTrainedTokenizerBase", config: RowsConfig) -> RecordEncoder:
    """Returns the encoder of the configured records.

    Raises:
      ConfigError: a setting does not fit the tokenizer.
      DataError: the tokenizer lacks a token or a chat template.
    """
    if config.examples.format != "none":
        return PromptFormat(tokenizer, config.examples, config.length,
                            start_token(tokenizer, config.add_bos, config.packing))
    bos, eos = boundary_tokens(tokenizer, config.add_bos, config.packing)
    return TextEncoder(tokenizer, config.text_key, bos, eos, ("starts",) if config.packing == "document_mask" else ())


@dataclasses.dataclass(frozen=True)
class ReadCursor:
    """The number of sources that have been read completely, and of records that have been read of the next one."""

    source: int = 0
    record: int = 0


def _read(sources: Sequence[Source], start: ReadCursor, columns: Sequence[str] | None,
          skip: bool) -> Iterator[tuple[tuple[ReadCursor, int], RecordChunk]]:
    """Yields ((cursor after the chunk, amount of the sources' sizes consumed), chunk) from `start` on."""
    before = sum(source.size or 0 for source in sources[:start.source])
    for number, source in enumerate(sources[start.source:], start.source):
        record = start.record if number == start.source else 0
        try:
            for chunk in read_chunks(source, record, columns):
                record = chunk.first - 1 + len(chunk.records)
                yield (ReadCursor(number, record), before + source.consumed), chunk
        except BrokenSource as error:
            if not skip:
                raise
            # An empty chunk carries the error, so that it is counted in its turn.
            yield ((ReadCursor(number + 1, 0), before + (source.size or 0)),
                   RecordChunk(source.name, source.unit, record + 1, [], str(error)))
        before += source.size or 0


def _bar(sources: Sequence[Source]) -> tqdm:
    known = all(source.size is not None for source in sources)
    total = sum(source.size for source in sources) if known else None
    return tqdm(desc="tokenizing", total=total, unit="", unit_scale=True, delay=2, leave=False)


def _no_text(sources: Sequence[Source], progress: "Progress") -> str:
    names = ", ".join(source.name for source in sources[:3]) + (" ..." if len(sources) > 3 else "")
    if progress.bad:
        count = progress.counts["bad_records"]
        return f"no record of {names} could be used ({count} are bad); the first: {progress.bad[0]}"
    if dropped := progress.counts["dropped"]:
        return (f"all {dropped} examples of {names} are longer than a row of {progress.layout.length} tokens, and were "
                "dropped; raise data.length, or set data.examples.overlong to truncate")
    return f"there is no text in {names}"


class Progress:
    """The state of a preparation, from which it can resume: what it has read, counted, packed and written.

    Attributes:
      cursor: how far the sources have been read.
      counts: documents and tokens of each split ("train.tokens"), bad records, and the encoder's statistics.
      bad: where the first bad records are, and why they cannot be used.
      shards: the files of each split that have been written.
    """

    def __init__(self, directory: str, identity: str, layout: RowLayout):
        self.directory, self.identity, self.layout = directory, identity, layout
        self.cursor = ReadCursor()
        self.counts: Counter = Counter()
        self.bad: list[str] = []
        self.shards: dict[str, list[Shard]] = {split: [] for split in SPLITS}
        self._packers = {split: RowPacker(layout.length) for split in SPLITS}
        self._pending: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}

    @property
    def tokens(self) -> int:
        return sum(self.counts[f"{split}.tokens"] for split in SPLITS)

    def add(self, encoded: EncodedChunk, cursor: ReadCursor) -> None:
        """Packs the tokens of the records before `cursor`."""
        for problem in encoded.bad:
            self.counts["bad_records"] += 1
            if len(self.bad) < _BAD_RECORDS_KEPT:
                self.bad.append(problem)
                log.warning("skipped: %s", problem)
            elif self.counts["bad_records"] == _BAD_RECORDS_KEPT + 1:
                log.warning("further bad records are counted, but not shown")
        for split, span in encoded.spans.items():
            rows = self._packers[split].add(span)
            if len(rows):
                self._pending[split].append(self.layout.encode(rows))
        self.counts.update(encoded.counts)
        self.cursor = cursor

    def pending_bytes(self, split: str) -> int:
        """Returns the bytes of the rows that have not been written."""
        return sum(block.nbytes for block in self._pending[split])

    def flush(self, split: str) -> None:
        """Writes the pending rows of a split as its next shard."""
        if self._pending[split]:
            file = f"{split}-{len(self.shards[split]):05d}.array_record"
            self.shards[split].append(write_shard(self.directory, file, self._pending[split]))
            self._pending[split] = []

    def summary(self, split: str) -> Split:
        """Returns the manifest's entry of a split."""
        shards = tuple(self.shards[split])
        return Split(sum(shard.rows for shard in shards), self.counts[f"{split}.documents"],
                     self.counts[f"{split}.tokens"], shards)

    def save(self) -> None:
        """Writes the state beside the shards."""
        facts = {"identity": self.identity, "cursor": dataclasses.asdict(self.cursor), "counts": self.counts,
                 "bad": self.bad, "shards": {split: list(map(dataclasses.asdict, shards))
                                             for split, shards in self.shards.items()}}
        arrays = {"facts": np.frombuffer(json.dumps(facts).encode(), np.uint8)}
        empty = np.zeros((0, self.layout.row_bytes), np.uint8)
        for split in SPLITS:
            arrays[f"{split}.tokens"] = self._packers[split].remainder.tokens
            arrays[f"{split}.starts"] = self._packers[split].remainder.starts
            arrays[f"{split}.pending"] = np.concatenate([empty, *self._pending[split]])
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        write_file(f"{self.directory}/{PROGRESS_FILE}", buffer.getvalue())

    @classmethod
    def load(cls, directory: str, identity: str, layout: RowLayout) -> Self:
        """Returns the saved state, or the initial one.

        Raises:
          DataError: the saved state belongs to other rows, or is damaged.
        """
        progress = cls(directory, identity, layout)
        content = read_file(f"{directory}/{PROGRESS_FILE}")
        if content is None:
            return progress
        try:
            with np.load(io.BytesIO(content)) as arrays:
                facts = json.loads(arrays["facts"].tobytes())
                if facts["identity"] != identity:
                    raise DataError(f"{directory} holds unfinished rows of other sources, settings or another "
                                    "tokenizer; choose another directory, or remove this one")
                for split in SPLITS:
                    progress._packers[split].remainder = TokenSpan(arrays[f"{split}.tokens"], arrays[f"{split}.starts"])
                    if len(pending := arrays[f"{split}.pending"]):
                        progress._pending[split].append(pending)
            progress.cursor, progress.counts = ReadCursor(**facts["cursor"]), Counter(facts["counts"])
            progress.bad = facts["bad"]
            progress.shards = {split: [Shard(**shard) for shard in facts["shards"][split]] for split in SPLITS}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{directory}/{PROGRESS_FILE} is damaged ({error}); remove {directory}, and run the same "
                            "command again") from error
        return progress


_function: Callable[[Any], Any]  # in a worker: the function it was started for


@contextlib.contextmanager
def ordered_map(function: Callable[[Any], Any], workers: int) -> Iterator[Callable[[Iterable], Iterator]]:
    """Provides a map over (tag, input) pairs, which yields (tag, function(input)) in order.

    Args:
      function: sent once to each worker, so it must be picklable, as must inputs and results.
      workers: processes; 0: the function runs in this one.

    Raises:
      DataError: a worker died.
    """
    if workers == 0:
        yield lambda pairs: ((tag, function(item)) for tag, item in pairs)
        return
    # Not forked: the threads of JAX and of tokenizers do not survive a fork.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, (function,))

    def in_order(pairs: Iterable) -> Iterator:
        waiting: deque = deque()
        for tag, item in pairs:
            waiting.append((tag, pool.submit(_call, item)))
            if len(waiting) >= _CHUNKS_PER_WORKER * workers:
                tag, future = waiting.popleft()
                yield tag, future.result()
        for tag, future in waiting:
            yield tag, future.result()

    try:
        yield in_order
    except BrokenProcessPool as error:
        raise DataError("a tokenizing process died, perhaps for lack of memory; run the same command again with fewer "
                        "workers to resume") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker(function: Callable[[Any], Any]) -> None:
    global _function
    _function = function
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then stops the workers
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism


def _call(item: Any) -> Any:
    return _function(item)
