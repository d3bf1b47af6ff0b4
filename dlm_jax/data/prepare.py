"""From sources to prepared rows: reads, tokenises in parallel, packs, and writes shards; interrupted, it goes on.

This process reads and packs, in one order; workers parse and tokenise. The rows therefore depend on the sources, the
tokenizer and the settings alone, not on the number of workers or on interruptions.
"""

import dataclasses
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from tqdm import tqdm

from dlm_jax.data import manifest as manifests
from dlm_jax.data import progress as progresses
from dlm_jax.data.config import RowsConfig
from dlm_jax.data.encode import Encoder, Form
from dlm_jax.data.examples import ExampleForm
from dlm_jax.data.manifest import Manifest, Part
from dlm_jax.data.progress import Mark, Progress
from dlm_jax.data.records import BrokenSource, Chunk
from dlm_jax.data.remote import make_directory, remove_file
from dlm_jax.data.shards import RowLayout
from dlm_jax.data.sources import Source, chunks
from dlm_jax.data.tokenize import TextForm, boundary_tokens, fingerprint
from dlm_jax.data.workers import ordered_map
from dlm_jax.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
      DataError: a source cannot be read, a record is bad and `config.bad_records` is "stop", the sources hold
        nothing, or `directory` holds other rows or cannot be written.
    """
    form = make_form(tokenizer, config)
    identity = manifests.identity_of(sources, tokenizer, config, form)
    if found := manifests.read(directory):
        if found.identity != identity:
            raise DataError(f"{directory} holds rows of other sources, settings or another tokenizer; choose another "
                            "directory, or remove this one")
        return found
    layout = RowLayout.fitting(config.length, len(tokenizer), form.planes)
    make_directory(directory)
    progress = Progress.load(directory, identity, layout)
    encoder, skip = Encoder(form, config.validation_fraction), config.bad_records == "skip"
    marks: deque[tuple[Mark, int]] = deque()  # of the chunks on their way, with how much the bar has then seen
    saved = time.monotonic()
    with ordered_map(encoder, workers) as encode, _bar(sources) as bar:
        for encoded in encode(_read(sources, progress.mark, form, skip, marks)):
            if encoded.bad and not skip:
                raise DataError(f"{encoded.bad[0]}; set data.bad_records to skip to leave such records out")
            mark, seen = marks.popleft()
            progress.absorb(encoded, mark)
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
    for part in progresses.PARTS:
        progress.flush(part)
    manifest = Manifest(
        identity=identity, layout=layout, settings=dataclasses.asdict(config), note=note,
        tokenizer={"name": tokenizer.name_or_path, "fingerprint": fingerprint(tokenizer), "vocab_size": len(tokenizer)},
        sources=tuple(source.name for source in sources),
        parts={part: Part(sum(shard.rows for shard in progress.shards[part]), progress.counts[f"{part}.documents"],
                          progress.counts[f"{part}.tokens"], tuple(progress.shards[part]))
               for part in progresses.PARTS if part == "train" or config.validation_fraction},
        counts={name: count for name, count in sorted(progress.counts.items()) if "." not in name},
        bad_records=tuple(progress.bad))
    manifest.write(directory)
    remove_file(f"{directory}/{progresses.FILE}")
    return manifest


def make_form(tokenizer: "PreTrainedTokenizerBase", config: RowsConfig) -> Form:
    """How this configuration reads records. Raises DataError where the tokenizer lacks what it needs."""
    if config.examples.format != "none":
        return ExampleForm(tokenizer, config.examples, config.length)
    segments = config.pack == "segments"
    bos, eos = boundary_tokens(tokenizer, add_bos=config.add_bos, segments=segments)
    return TextForm(tokenizer, config.text_key, bos, eos, ("starts",) if segments else ())


def _read(sources: Sequence[Source], start: Mark, form: Form, skip: bool,
          marks: "deque[tuple[Mark, int]]") -> Iterator[Chunk]:
    """The chunks from `start` on; where reading stands after each is appended to `marks`."""
    seen = sum(source.size or 0 for source in sources[:start.source])
    for number, source in enumerate(sources[start.source:], start.source):
        record = start.record if number == start.source else 0
        try:
            for chunk in chunks(source, record, form.columns):
                record = chunk.first - 1 + len(chunk.payloads)
                marks.append((Mark(number, record), seen + source.done()))
                yield chunk
        except BrokenSource as error:
            if not skip:
                raise
            # An empty chunk that carries the news, so that it is counted in its turn.
            marks.append((Mark(number + 1, 0), seen + (source.size or 0)))
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
