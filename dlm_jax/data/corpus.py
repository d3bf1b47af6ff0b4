"""From a DataConfig to row sources: prepared directories are opened; raw text is first prepared into a cache."""

import itertools
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dlm_jax.data.config import DataConfig, RowsConfig
from dlm_jax.data.manifest import (
    MANIFEST_FILE,
    Manifest,
    check_compatible,
    check_prompt_format,
    read_manifest,
    rows_identity,
)
from dlm_jax.data.prepare import PROGRESS_FILE, make_encoder, prepare
from dlm_jax.data.rows import ConcatenatedRows, RowSource
from dlm_jax.data.source_files import Source
from dlm_jax.data.sources import open_sources
from dlm_jax.data.tokenization import id_limit
from dlm_jax.errors import DataError
from dlm_jax.storage import is_remote, read_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_rows(config: DataConfig, tokenizer: "PreTrainedTokenizerBase", *, vocab_size: int,
              cache_dir: str | Path) -> tuple[list[RowSource], RowSource | None]:
    """Opens the training rows and the validation rows (None where nothing is held out) of a corpus.

    Raw text is tokenized into `config.cache_dir`, else `cache_dir`, once: a second run finds the rows there. Prepared
    rows on an object store are copied to it.

    Returns:
      One training source per weight, or a single one where no weights are given; the validation rows.

    Raises:
      DataError: nothing matches, a file is damaged, the corpus is too small for one row or for a validation split, or
        the tokenizer or prepared rows do not fit the model.
    """
    if id_limit(tokenizer) > vocab_size:
        raise DataError(f"the tokenizer {tokenizer.name_or_path!r} has ids up to {id_limit(tokenizer) - 1}, and the "
                        f"model's vocabulary has {vocab_size}; use the tokenizer that belongs to the model")
    if not config.train:
        raise DataError("data.train names no text; give files or globs, or a directory made by `dlm prepare`")
    cache = Path(config.cache_dir or cache_dir)
    prepared = {entry: manifest for entry in (*config.train, *config.validation)
                if (manifest := prepared_manifest(entry))}

    def raw_sources(entries: Sequence[str]) -> list[Source]:
        return open_raw_sources(config, [entry for entry in entries if entry not in prepared])

    def manifests_of(entries: Sequence[str], rows_config: RowsConfig) -> list[Manifest]:
        """Returns the manifests of prepared entries, and of the rows made from all raw ones."""
        found = [prepared[entry] for entry in entries if entry in prepared]
        for manifest in found:
            check_compatible(manifest, rows_config, tokenizer)
        raw = raw_sources(entries)
        return found + ([_prepare_cached(raw, cache, tokenizer, rows_config)] if raw else [])

    def raw_files(entries: Sequence[str]) -> set[str]:
        return {source.identity[0] for source in raw_sources(entries)}

    if config.validation and (shared := raw_files(config.train) & raw_files(config.validation)):
        raise DataError(f"{min(shared)} is both training and validation text")
    entries = [(entry,) for entry in config.train] if config.weights else [config.train]
    opened = [manifests_of(entry, config.rows_config()) for entry in entries]
    manifests = list(itertools.chain.from_iterable(opened))
    if all(entry in prepared for entry in config.train):  # else the format says how raw text is read
        check_prompt_format(manifests, config)
    train = [_concatenate([manifest.rows("train", cache) for manifest in group]) for group in opened]
    for entry, group, rows in zip(entries, opened, train, strict=True):
        if not len(rows):
            raise DataError(_no_rows(", ".join(entry), group, config.length))
    if config.validation:
        manifests = manifests_of(config.validation, config.rows_config(0.0))
    else:
        manifests = [manifest for manifest in manifests if "validation" in manifest.splits]
        if not manifests:
            return train, None
    held_out = _concatenate([manifest.rows("validation" if "validation" in manifest.splits else "train", cache)
                             for manifest in manifests])
    if not len(held_out):
        raise DataError(_no_rows("the held-out text", manifests, config.length,
                                 ", validation files or a larger data.validation_fraction"))
    return train, held_out


def open_raw_sources(config: RowsConfig, specs: Sequence[str]) -> list[Source]:
    """Returns the sources of raw text that files, globs and names of datasets mean."""
    lines = "\n" if config.examples.format != "none" else ""  # a text file holds one example per line
    return open_sources(specs, separator=config.document_separator or lines)


def _prepare_cached(sources: Sequence[Source], cache: Path, tokenizer: "PreTrainedTokenizerBase",
                    config: RowsConfig) -> Manifest:
    """Returns the manifest of the rows made from raw sources, now or before."""
    identity = rows_identity(sources, tokenizer, config, make_encoder(tokenizer, config))
    directory = cache / identity
    if not directory.exists():
        # Processes that share the folder do the same computation at the same time; the first to finish wins.
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=identity + ".", dir=cache) as folder:
                rows = os.path.join(folder, "rows")
                prepare(sources, rows, tokenizer, config)
                os.rename(rows, directory)
        except OSError as error:
            if not directory.exists():
                raise DataError(f"{directory}: the rows cannot be written ({error})") from error
    manifest = read_manifest(str(directory))
    if manifest is None:
        raise DataError(f"the rows in {directory} are damaged (no {MANIFEST_FILE}); remove it")
    return manifest


def prepared_manifest(entry: str) -> Manifest | None:
    """Returns the manifest of an entry that is a prepared directory.

    Raises:
      DataError: the directory is not complete.
    """
    if entry.startswith(("tfds:", "hf:")) or not (is_remote(entry) or Path(entry).is_dir()):
        return None
    directory = entry.rstrip("/")
    manifest = read_manifest(directory)
    if manifest is None and read_file(f"{directory}/{PROGRESS_FILE}") is not None:
        raise DataError(f"the rows in {directory} are not finished; run its `dlm prepare` command again to resume")
    return manifest


def _concatenate(sources: list[RowSource]) -> RowSource:
    return sources[0] if len(sources) == 1 else ConcatenatedRows(sources)


def _no_rows(text: str, manifests: Sequence[Manifest], length: int, remedy: str = "") -> str:
    if dropped := sum(manifest.counts.get("dropped", 0) for manifest in manifests):
        return (f"{text} gives no row: {dropped} examples are longer than a row of {length} tokens, and were dropped; "
                "raise data.length, or set data.examples.overlong to truncate")
    return (f"{text} is too short for one row of {length} tokens; give more text{remedy} or a smaller data.length. "
            "(Without data.document_separator a .txt file is one document.)")
