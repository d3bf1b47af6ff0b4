"""From a DataConfig to rows: read, hold out, tokenise, pack, and keep on disk for the next run."""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from dlm_jax.data import rows as row_files
from dlm_jax.data import sources, tokenize
from dlm_jax.data.config import DataConfig
from dlm_jax.data.packing import pack
from dlm_jax.data.rows import Rows
from dlm_jax.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FORMAT = 1  # raise when the same inputs would give other rows


def load_rows(
    config: DataConfig, tokenizer: "PreTrainedTokenizerBase", *, vocab_size: int, cache_dir: str | Path
) -> tuple[Rows, Rows | None]:
    """The training rows and the validation rows (None where nothing is held out) of a corpus.

    Rows are kept in `config.cache_dir`, else `cache_dir`, under a fingerprint of the files (path, size,
    time), the tokenizer and the settings, so that a second run maps them at once.

    Raises:
      DataError: no file matches, a file is corrupt, the corpus is too small for one row or for a held-out
        part, or the tokenizer has more tokens than the model's `vocab_size`.
    """
    if len(tokenizer) > vocab_size:
        raise DataError(
            f"the tokenizer {tokenizer.name_or_path!r} has {len(tokenizer)} tokens, the model's vocabulary "
            f"only {vocab_size}; use the tokenizer that belongs to the model"
        )
    if not config.train:
        raise DataError("data.train names no file; give paths or globs of text")
    train, validation = sources.expand(config.train), sources.expand(config.validation)
    if shared := {path.resolve() for path in train} & {path.resolve() for path in validation}:
        raise DataError(f"{min(shared)} is both training and validation text")
    cache = Path(config.cache_dir or cache_dir)
    if validation:
        return (
            _cached(config, train, "train", 0.0, tokenizer, cache),
            _cached(config, validation, "validation", 0.0, tokenizer, cache),
        )
    fraction = config.validation_fraction
    training_rows = _cached(config, train, "train", fraction, tokenizer, cache)
    return training_rows, _cached(config, train, "held-out", fraction, tokenizer, cache) if fraction else None


def is_held_out(document: str, fraction: float) -> bool:
    """Whether a document is in the held-out part: by a hash of its text, whatever its neighbours."""
    digest = hashlib.blake2b(document.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def _cached(
    config: DataConfig,
    paths: list[Path],
    part: str,
    fraction: float,
    tokenizer: "PreTrainedTokenizerBase",
    cache: Path,
) -> Rows:
    segments = config.pack == "segments"
    bos, eos = tokenize.boundary_tokens(tokenizer, add_bos=config.add_bos, segments=segments)
    directory = cache / _fingerprint(
        [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths],
        [part, fraction, config.text_key, config.document_separator, config.length, segments, bos, eos],
        tokenize.fingerprint(tokenizer),
    )
    if not directory.exists():
        documents = sources.documents(paths, text_key=config.text_key, separator=config.document_separator)
        wanted = (text for text in documents if is_held_out(text, fraction) == (part == "held-out"))
        wanted = tqdm(wanted, f"tokenising the {part} text", unit=" documents", delay=2, leave=False)
        blocks = pack(tokenize.encode(wanted, tokenizer), config.length, bos=bos, eos=eos)
        row_files.write(directory, blocks, length=config.length, segments=segments)
    found = row_files.read(directory)
    if not len(found):
        raise DataError(
            f"the {part} text is too short for one row of {config.length} tokens; give more text"
            + (", validation files or a larger data.validation_fraction" if part == "held-out" else "")
            + " or a smaller data.length. (Without data.document_separator a .txt file is one document.)"
        )
    return found


def _fingerprint(*facts) -> str:
    return hashlib.sha256(json.dumps([_FORMAT, *facts]).encode()).hexdigest()[:20]
