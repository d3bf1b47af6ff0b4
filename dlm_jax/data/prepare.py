"""What a directory of prepared rows is: one small JSON file, written last; without it the directory is not finished."""

import contextlib
import dataclasses
import hashlib
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
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from tqdm import tqdm

from dlm_jax.data.config import RowsConfig
from dlm_jax.data.prompts import PromptFormat
from dlm_jax.data.records import (
    BrokenSource,
    Chunk,
    Encoded,
    Encoder,
    RecordEncoder,
    TextEncoder,
    TokenSpan,
    boundary_tokens,
    tokenizer_fingerprint,
)
from dlm_jax.data.rows import Packer
from dlm_jax.data.shards import RowFiles, RowLayout, Shard, write_shard
from dlm_jax.data.sources import Source, chunks
from dlm_jax.errors import DataError
from dlm_jax.storage import cache_folder, fetch_files, is_remote, make_directory, read_file, remove_file, write_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


MANIFEST_FILE = "manifest.json"
FORMAT = 1  # raise when the same inputs would give other rows


@dataclasses.dataclass(frozen=True)
class Part:
    """The training or the validation rows, and what they were made from."""

    rows: int
    documents: int
    tokens: int
    shards: tuple[Shard, ...]


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Attributes:
    identity: tells these rows from any others, see `identity_of`.
    layout: how a row is stored.
    tokenizer: name, fingerprint and vocab_size of the tokenizer.
    settings: the `RowsConfig`, as nested dicts.
    sources: what the rows were made from.
    note: licence or anything else the user wanted kept.
    parts: "train", and "validation" where documents were held out.
    counts: what else was counted: bad records, examples truncated or dropped.
    bad_records: where the first bad records are, and what is wrong with them.
    """

    identity: str
    layout: RowLayout
    tokenizer: dict[str, Any]
    settings: dict[str, Any]
    sources: tuple[str, ...]
    note: str
    parts: dict[str, Part]
    counts: dict[str, int]
    bad_records: tuple[str, ...]

    def write(self, directory: str) -> None:
        content = {"format": FORMAT, **dataclasses.asdict(self)}
        write_file(f"{directory}/{MANIFEST_FILE}", (json.dumps(content, indent=1) + "\n").encode())

    def rows(self, directory: str, part: str, cache: Path | None = None) -> RowFiles:
        """The rows of a part, copied to `cache` (default: the user's) if they are on an object store.

        Raises:
          DataError: a file is not as it was written, or the copy cannot be made.
        """
        shards = self.parts[part].shards
        if is_remote(directory):
            folder = (cache or cache_folder() / "rows") / f"{self.identity}-copy"
            fetch_files(directory, {shard.file: shard.bytes for shard in shards}, folder)
            directory = str(folder)
        return RowFiles(directory, shards, self.layout)


def read_manifest(directory: str) -> Manifest | None:
    """The manifest of a directory, or None where there is none.

    Raises:
      DataError: it is damaged, or of another version.
    """
    path = f"{directory}/{MANIFEST_FILE}"
    content = read_file(path)
    if content is None:
        return None
    try:
        facts = json.loads(content)
        if facts.pop("format") != FORMAT:
            raise DataError(f"{path} was written by another version of dlm_jax; prepare the corpus again")
        facts["layout"] = RowLayout(**facts["layout"] | {"row_masks": tuple(facts["layout"]["row_masks"])})
        facts["parts"] = {name: Part(**part | {"shards": tuple(Shard(**shard) for shard in part["shards"])})
                          for name, part in facts["parts"].items()}
        return Manifest(**facts | {key: tuple(facts[key]) for key in ("sources", "bad_records")})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is not a manifest of prepared rows ({error}); prepare the corpus again") from error


def identity_of(sources: Sequence[Source], tokenizer: "PreTrainedTokenizerBase", config: RowsConfig, form: RecordEncoder) -> str:
    """A hash of all that decides the rows: the sources' content, the tokenizer, the settings."""
    settings = dataclasses.asdict(config)
    settings.pop("on_bad_record")  # a run that met one may go on with another policy
    facts = [FORMAT, [source.identity() for source in sources], tokenizer_fingerprint(tokenizer), settings, form.facts]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:20]


def rows_config(config: RowsConfig, validation_fraction: float) -> RowsConfig:
    """The part of `config`, perhaps a `DataConfig`, that decides the rows."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(RowsConfig)}
    return RowsConfig(**values | {"validation_fraction": validation_fraction})


def check_fit(manifest: Manifest, directory: str, config: RowsConfig, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raises DataError where prepared rows do not fit what training asks for."""
    made = manifest.tokenizer
    if made["fingerprint"] != tokenizer_fingerprint(tokenizer):
        raise DataError(f"the rows in {directory} were made with another tokenizer ({made['name']}, "
                        f"{made['vocab_size']} tokens) than the model's ({tokenizer.name_or_path}); prepare the corpus "
                        "with the model's own")
    for name in ("length", "pack"):
        asked, found = getattr(config, name), manifest.settings[name]
        if asked != found:
            raise DataError(f"the rows in {directory} were prepared with {name}={found}, but data.{name} is {asked}; "
                            f"set --config.data.{name}={found}, or prepare the corpus again")


def check_examples(prepared: Sequence[tuple[str, Manifest]], config: RowsConfig) -> None:
    """Raises DataError where none of the examples in prepared rows are written as `config` has it: the record of the
    run, by which the model will be asked, would be wrong."""
    made = [(directory, manifest.settings["examples"]) for directory, manifest in prepared
            if manifest.settings["examples"]["format"] != "none"]
    asked = dataclasses.asdict(config.examples)
    wrong = [[name for name in ("format", "separator", "split_digits", "chat_template") if asked[name] != form[name]]
             for _, form in made]
    if made and all(wrong):
        (directory, form), (name, *_) = made[0], wrong[0]
        raise DataError(f"the rows in {directory} were prepared with examples.{name}={form[name]!r}, but data.examples."
                        f"{name} is {asked[name]!r}; set it as it was, so that the run's record is right")


# ---- How far a preparation has come: what it counted, packed and wrote, so that it can go on from there.


PROGRESS_FILE = "progress.npz"
PARTS = ("train", "validation")
_BAD_RECORDS_KEPT = 100

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ReadCursor:
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
        self.cursor = ReadCursor()
        self.counts: Counter = Counter()
        self.bad: list[str] = []
        self.shards: dict[str, list[Shard]] = {part: [] for part in PARTS}
        self._packers = {part: Packer(layout.length) for part in PARTS}
        self._pending: dict[str, list[np.ndarray]] = {part: [] for part in PARTS}

    @property
    def tokens(self) -> int:
        return sum(self.counts[f"{part}.tokens"] for part in PARTS)

    def absorb(self, encoded: Encoded, reached: ReadCursor) -> None:
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
        self.cursor = reached

    def pending_bytes(self, part: str) -> int:
        return sum(block.nbytes for block in self._pending[part])

    def flush(self, part: str) -> None:
        """Writes what is pending of a part as its next shard."""
        if self._pending[part]:
            file = f"{part}-{len(self.shards[part]):05d}.array_record"
            self.shards[part].append(write_shard(self.directory, file, self._pending[part]))
            self._pending[part] = []

    def save(self) -> None:
        facts = {"identity": self.identity, "mark": dataclasses.asdict(self.cursor), "counts": self.counts,
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
        write_file(f"{self.directory}/{PROGRESS_FILE}", buffer.getvalue())

    @classmethod
    def load(cls, directory: str, identity: str, layout: RowLayout) -> Self:
        """What `save` left, or the very beginning.

        Raises:
          DataError: what was saved belongs to other rows, or is damaged.
        """
        progress = cls(directory, identity, layout)
        content = read_file(f"{directory}/{PROGRESS_FILE}")
        if content is None:
            return progress
        try:
            with np.load(io.BytesIO(content)) as arrays:
                facts = json.loads(arrays["facts"].tobytes())
                if facts["identity"] != identity:
                    raise DataError(f"{directory} holds the beginning of rows of other sources, settings or another "
                                    "tokenizer; choose another directory, or remove this one")
                for part in PARTS:
                    progress._packers[part].rest = TokenSpan(arrays[f"{part}.tokens"], arrays[f"{part}.starts"])
                    progress._pending[part] = [arrays[f"{part}.pending"]] if len(arrays[f"{part}.pending"]) else []
            progress.cursor, progress.counts, progress.bad = ReadCursor(**facts["mark"]), Counter(facts["counts"]), facts["bad"]
            progress.shards = {part: [Shard(**shard) for shard in facts["shards"][part]] for part in PARTS}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{directory}/{PROGRESS_FILE} is damaged ({error}); remove {directory}, and begin again") from error
        return progress


# ---- A pure function over a stream of inputs, in worker processes, with the results in order.


_AHEAD = 3  # inputs a worker that are on their way at a time

_function: Callable[[Any], Any]  # in a worker: what it was started for


@contextlib.contextmanager
def ordered_map(function: Callable[[Any], Any], workers: int) -> Iterator[Callable[[Iterable], Iterator]]:
    """Gives `map(inputs)`, which yields `function(x)` for each input in order.

    Args:
      function: sent once to each worker, so it must be picklable, and so must inputs and results.
      workers: processes; 0: the work is done here.

    Raises:
      DataError: a worker died.
    """
    if workers == 0:
        yield lambda inputs: map(function, inputs)
        return
    # Not forked: the threads of JAX and of tokenizers do not survive a fork.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start, (function,))

    def in_order(inputs: Iterable) -> Iterator:
        waiting: deque = deque()
        for item in inputs:
            waiting.append(pool.submit(_call, item))
            if len(waiting) >= _AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    try:
        yield in_order
    except BrokenProcessPool as error:
        raise DataError("a tokenising process died, perhaps for lack of memory; run the same command again with fewer "
                        "workers, and it goes on from where it stopped") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start(function: Callable[[Any], Any]) -> None:
    global _function
    _function = function
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then stops the workers
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism


def _call(item: Any) -> Any:
    return _function(item)


# ---- From sources to prepared rows: reads, tokenises in parallel, packs, and writes shards; interrupted, it goes on.
#
# This process reads and packs, in one order; workers parse and tokenise. The rows therefore depend on the sources, the
# tokenizer and the settings alone, not on the number of workers or on interruptions.


SHARD_BYTES = 64 << 20
_SAVE_SECONDS = 60  # at most so much work is lost


def prepare(sources: Sequence[Source], directory: str, tokenizer: "PreTrainedTokenizerBase", config: RowsConfig, *,
            workers: int = 0, shard_bytes: int = SHARD_BYTES, note: str = "") -> Manifest:
    """Writes the rows of `sources` and their manifest into `directory`, or finds that they are there already.

    Args:
      directory: local or on an object store; the manifest, written last, marks it as finished.
      workers: processes that tokenise; 0: this one does.
      shard_bytes: about how large a file becomes.
      note: kept in the manifest, for a licence.

    Raises:
      DataError: a source cannot be read, a record is bad and `config.on_bad_record` is "raise", the sources hold
        nothing, or `directory` holds other rows or cannot be written.
    """
    form = make_form(tokenizer, config)
    identity = identity_of(sources, tokenizer, config, form)
    if found := read_manifest(directory):
        if found.identity != identity:
            raise DataError(f"{directory} holds rows of other sources, settings or another tokenizer; choose another "
                            "directory, or remove this one")
        return found
    layout = RowLayout.fitting(config.length, len(tokenizer), form.row_masks)
    make_directory(directory)
    progress = Progress.load(directory, identity, layout)
    encoder, skip = Encoder(form, config.validation_fraction), config.on_bad_record == "skip"
    marks: deque[tuple[ReadCursor, int]] = deque()  # of the chunks on their way, with how much the bar has then seen
    saved = time.monotonic()
    with ordered_map(encoder, workers) as encode, _bar(sources) as bar:
        for encoded in encode(_read(sources, progress.cursor, form, skip, marks)):
            if encoded.bad and not skip:
                raise DataError(f"{encoded.bad[0]}; set data.on_bad_record to skip to leave such records out")
            cursor, seen = marks.popleft()
            progress.absorb(encoded, cursor)
            bar.set_postfix_str(f"{progress.tokens / 1e6:,.1f}M tokens", refresh=False)
            bar.update(seen - bar.n)
            full = progress.pending_bytes("train") >= shard_bytes
            if full:
                progress.flush("train")
            if full or time.monotonic() - saved > _SAVE_SECONDS:
                progress.save()
                saved = time.monotonic()
    if not progress.tokens:
        raise DataError(_nothing(sources, progress))
    for part in PARTS:
        progress.flush(part)
    manifest = Manifest(
        identity=identity, layout=layout, settings=dataclasses.asdict(config), note=note,
        tokenizer={"name": tokenizer.name_or_path, "fingerprint": tokenizer_fingerprint(tokenizer), "vocab_size": len(tokenizer)},
        sources=tuple(source.name for source in sources),
        parts={part: Part(sum(shard.rows for shard in progress.shards[part]), progress.counts[f"{part}.documents"],
                          progress.counts[f"{part}.tokens"], tuple(progress.shards[part]))
               for part in PARTS if part == "train" or config.validation_fraction},
        counts={name: count for name, count in sorted(progress.counts.items()) if "." not in name},
        bad_records=tuple(progress.bad))
    manifest.write(directory)
    remove_file(f"{directory}/{PROGRESS_FILE}")
    return manifest


def make_form(tokenizer: "PreTrainedTokenizerBase", config: RowsConfig) -> RecordEncoder:
    """How this configuration reads records. Raises DataError where the tokenizer lacks what it needs."""
    if config.examples.format != "none":
        return PromptFormat(tokenizer, config.examples, config.length)
    segments = config.packing == "document_mask"
    bos, eos = boundary_tokens(tokenizer, add_bos=config.add_bos, segments=segments)
    return TextEncoder(tokenizer, config.text_key, bos, eos, ("starts",) if segments else ())


def _read(sources: Sequence[Source], start: ReadCursor, form: RecordEncoder, skip: bool,
          marks: "deque[tuple[ReadCursor, int]]") -> Iterator[Chunk]:
    """The chunks from `start` on; where reading stands after each is appended to `marks`."""
    seen = sum(source.size or 0 for source in sources[:start.source])
    for number, source in enumerate(sources[start.source:], start.source):
        record = start.record if number == start.source else 0
        try:
            for chunk in chunks(source, record, form.columns):
                record = chunk.first - 1 + len(chunk.payloads)
                marks.append((ReadCursor(number, record), seen + source.done()))
                yield chunk
        except BrokenSource as error:
            if not skip:
                raise
            # An empty chunk that carries the news, so that it is counted in its turn.
            marks.append((ReadCursor(number + 1, 0), seen + (source.size or 0)))
            yield Chunk(source.name, source.unit, record + 1, [], str(error))
        seen += source.size or 0


def _bar(sources: Sequence[Source]) -> tqdm:
    known = all(source.size is not None for source in sources)
    total = sum(source.size for source in sources) if known else None
    return tqdm(desc="tokenising", total=total, unit="", unit_scale=True, delay=2, leave=False)


def _nothing(sources: Sequence[Source], progress: Progress) -> str:
    names = ", ".join(source.name for source in sources[:3]) + (" ..." if len(sources) > 3 else "")
    if progress.bad:
        count = progress.counts["bad_records"]
        return f"no record of {names} could be used ({count} are bad); the first: {progress.bad[0]}"
    return f"there is no text in {names}"
