"""From a DataConfig to row sources: prepared directories are opened, raw text is prepared into a cache first."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dlm_jax.data.config import DataConfig, RowsConfig
from dlm_jax.data.prepare import (
    MANIFEST_FILE,
    PROGRESS_FILE,
    Manifest,
    check_examples,
    check_fit,
    identity_of,
    make_form,
    prepare,
    read_manifest,
    rows_config,
)
from dlm_jax.data.rows import Concatenated, RowSource
from dlm_jax.data.sources import Source, open_sources
from dlm_jax.errors import DataError
from dlm_jax.storage import is_remote, read_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_rows(config: DataConfig, tokenizer: "PreTrainedTokenizerBase", *, vocab_size: int,
              cache_dir: str | Path) -> tuple[list[RowSource], RowSource | None]:
    """The training rows and the validation rows (None where nothing is held out) of a corpus.

    Raw text is tokenised into `config.cache_dir`, else `cache_dir`, once: a second run finds the rows there. Prepared
    rows on an object store are copied to it.

    Returns:
      One training source for each weight, or a single one where no weights are given; the validation rows.

    Raises:
      DataError: nothing matches, a file is damaged, the corpus is too small for one row or for a held-out part, or
        the tokenizer or prepared rows do not fit the model.
    """
    if len(tokenizer) > vocab_size:
        raise DataError(f"the tokenizer {tokenizer.name_or_path!r} has {len(tokenizer)} tokens, the model's vocabulary "
                        f"only {vocab_size}; use the tokenizer that belongs to the model")
    if not config.train:
        raise DataError("data.train names no text; give files or globs, or a directory made by `dlm prepare`")
    cache = Path(config.cache_dir or cache_dir)
    corpora = _Corpora(config, tokenizer, cache)
    if config.validation and (shared := corpora.raw_files(config.train) & corpora.raw_files(config.validation)):
        raise DataError(f"{min(shared)} is both training and validation text")
    held_out = 0.0 if config.validation else config.validation_fraction
    entries = [(entry,) for entry in config.train] if config.weights else [config.train]
    opened = [corpora.open(entry, held_out) for entry in entries]
    if all(_prepared(entry) for entry in config.train):  # else it tells how raw text is read
        check_examples([pair for pairs in opened for pair in pairs], config)
    train = [_joined([manifest.rows(directory, "train", cache) for directory, manifest in found]) for found in opened]
    for entry, rows in zip(entries, train, strict=True):
        if not len(rows):
            raise DataError(_too_short(", ".join(entry), config.length))
    if config.validation:
        found = corpora.open(config.validation, 0.0)
    else:
        found = [pair for pairs in opened for pair in pairs if "validation" in pair[1].parts]
        if not found:
            return train, None
    held = _joined([manifest.rows(directory, "validation" if "validation" in manifest.parts else "train", cache)
                    for directory, manifest in found])
    if not len(held):
        raise DataError(_too_short("the held-out text", config.length,
                                   ", validation files or a larger data.validation_fraction"))
    return train, held


def sources_of(config: RowsConfig, specs: Sequence[str]) -> list[Source]:
    """The sources of raw text that files, globs and names of datasets mean."""
    lines = "\n" if config.examples.format != "none" else ""  # examples in a text file stand one in a line
    return open_sources(specs, separator=config.document_separator or lines)


class _Corpora:
    """Opens entries of `data.train` and `data.validation` for one configuration and tokenizer."""

    def __init__(self, config: DataConfig, tokenizer: "PreTrainedTokenizerBase", cache: Path):
        self._config, self._tokenizer, self._cache = config, tokenizer, cache

    def open(self, entries: Sequence[str], validation_fraction: float) -> list[tuple[str, Manifest]]:
        """Prepared rows with their directories: those that entries name, and those made from all raw entries."""
        found, raw = [], []
        for entry in entries:
            if manifest := _prepared(entry):
                check_fit(manifest, entry, self._config, self._tokenizer)
                found.append((entry, manifest))
            else:
                raw.append(entry)
        return found + ([self._cached(sources_of(self._config, raw), validation_fraction)] if raw else [])

    def raw_files(self, entries: Sequence[str]) -> set[str]:
        raw = [entry for entry in entries if not _prepared(entry)]
        return {source.identity()[0] for source in sources_of(self._config, raw)} if raw else set()

    def _cached(self, sources: Sequence[Source], validation_fraction: float) -> tuple[str, Manifest]:
        config = rows_config(self._config, validation_fraction)
        identity = identity_of(sources, self._tokenizer, config, make_form(self._tokenizer, config))
        directory = self._cache / identity
        if not directory.exists():
            # Processes that share the folder do the same work beside each other, and the first to finish wins.
            try:
                self._cache.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryDirectory(prefix=identity + ".", dir=self._cache) as beside:
                    rows = os.path.join(beside, "rows")
                    prepare(sources, rows, self._tokenizer, config)
                    os.rename(rows, directory)
            except OSError as error:
                if not directory.exists():
                    raise DataError(f"{directory}: the rows cannot be written ({error})") from error
        manifest = read_manifest(str(directory))
        if manifest is None:
            raise DataError(f"the rows in {directory} are damaged (no {MANIFEST_FILE}); remove it")
        return str(directory), manifest


def _prepared(entry: str) -> Manifest | None:
    """The manifest of an entry that is a prepared directory, finished or not."""
    if entry.startswith(("tfds:", "hf:")) or not (is_remote(entry) or Path(entry).is_dir()):
        return None
    directory = entry.rstrip("/")
    manifest = read_manifest(directory)
    if manifest is None and read_file(f"{directory}/{PROGRESS_FILE}") is not None:
        raise DataError(f"the rows in {directory} are not finished; run its `dlm prepare` command again, and it "
                        "goes on")
    return manifest


def _joined(sources: list[RowSource]) -> RowSource:
    return sources[0] if len(sources) == 1 else Concatenated(sources)


def _too_short(what: str, length: int, remedy: str = "") -> str:
    return (f"{what} is too short for one row of {length} tokens; give more text{remedy} or a smaller data.length. "
            "(Without data.document_separator a .txt file is one document.)")
