"""The manifest of a directory of prepared rows: a small JSON file, written last, that says what the rows are."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlm_jax.data.config import RowsConfig
from dlm_jax.data.records import RecordEncoder
from dlm_jax.data.shards import RowLayout, Shard, ShardedRows
from dlm_jax.data.source_files import Source
from dlm_jax.data.tokenization import start_token, tokenizer_fingerprint
from dlm_jax.errors import DataError
from dlm_jax.storage import cache_folder, fetch_files, is_remote, read_file, write_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MANIFEST_FILE = "manifest.json"
FORMAT = 3  # increase when the same inputs would give other rows, or the manifest has other fields


@dataclasses.dataclass(frozen=True)
class Split:
    """The training or the validation rows, and what they were made from."""

    rows: int
    documents: int
    tokens: int
    shards: tuple[Shard, ...]


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a directory of prepared rows holds.

    Attributes:
      directory: where it is, local or on an object store; not in the file.
      identity: a hash of all that decides the rows, see `rows_identity`.
      layout: how a row is stored.
      tokenizer: name, fingerprint and vocab_size of the tokenizer.
      settings: the `RowsConfig`, as nested dicts.
      sources: the names of the sources.
      note: the user's note, such as a license.
      splits: "train", and "validation" where documents were held out.
      counts: other statistics: bad records, examples truncated or dropped.
      bad_records: where the first bad records are, and why they cannot be used.
    """

    directory: str
    identity: str
    layout: RowLayout
    tokenizer: dict[str, Any]
    settings: dict[str, Any]
    sources: tuple[str, ...]
    note: str
    splits: dict[str, Split]
    counts: dict[str, int]
    bad_records: tuple[str, ...]

    def write(self) -> None:
        content = {"format": FORMAT, **dataclasses.asdict(self)}
        del content["directory"]
        write_file(f"{self.directory}/{MANIFEST_FILE}", (json.dumps(content, indent=1) + "\n").encode())

    def rows(self, split: str, cache: Path | None = None) -> ShardedRows:
        """Returns the rows of a split, copied to `cache` (default: the user's) if they are on an object store.

        Raises:
          DataError: a file is not as it was written, or the copy cannot be made.
        """
        shards, directory = self.splits[split].shards, self.directory
        if is_remote(directory):
            folder = (cache or cache_folder() / "rows") / f"{self.identity}-copy"
            fetch_files(directory, {shard.file: shard.bytes for shard in shards}, folder)
            directory = str(folder)
        return ShardedRows(directory, shards, self.layout)


def read_manifest(directory: str) -> Manifest | None:
    """Returns the manifest of a directory, or None where there is none.

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
        facts["splits"] = {name: Split(**split | {"shards": tuple(Shard(**shard) for shard in split["shards"])})
                           for name, split in facts["splits"].items()}
        return Manifest(directory, **facts | {key: tuple(facts[key]) for key in ("sources", "bad_records")})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is not a manifest of prepared rows ({error}); prepare the corpus again") from error


def rows_identity(sources: Sequence[Source], tokenizer: "PreTrainedTokenizerBase", config: RowsConfig,
                  encoder: RecordEncoder) -> str:
    """Returns a hash of all that decides the rows: the content of the sources, the tokenizer, the settings."""
    settings = dataclasses.asdict(config)
    settings.pop("on_bad_record")  # a run that stopped at one can resume with the other policy
    facts = [FORMAT, [source.identity for source in sources], tokenizer_fingerprint(tokenizer), settings,
             encoder.facts]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:20]


def check_compatible(manifest: Manifest, config: RowsConfig, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raises DataError unless prepared rows have the tokenizer, length and packing that training asks for."""
    directory, used = manifest.directory, manifest.tokenizer
    if used["fingerprint"] != tokenizer_fingerprint(tokenizer):
        raise DataError(f"the rows in {directory} were made with another tokenizer ({used['name']}, "
                        f"{used['vocab_size']} tokens) than the model's ({tokenizer.name_or_path}); prepare the corpus "
                        "with the model's own")
    for name in ("length", "packing"):
        asked, found = getattr(config, name), manifest.settings[name]
        if asked != found:
            raise DataError(f"the rows in {directory} were prepared with {name}={found}, but data.{name} is {asked}; "
                            f"set --config.data.{name}={found}, or prepare the corpus again")
    found, asked = (start_token(tokenizer, add_bos, config.packing)
                    for add_bos in (manifest.settings["add_bos"], config.add_bos))
    if found != asked:  # the run's record, by which the model generates later, would be wrong
        raise DataError(f"the rows in {directory} were prepared with add_bos={manifest.settings['add_bos']}, so that "
                        f"token {found} is before a document, but with data.add_bos {config.add_bos} it is {asked}; "
                        f"set --config.data.add_bos={manifest.settings['add_bos']}, or prepare the corpus again")


def check_prompt_format(manifests: Sequence[Manifest], config: RowsConfig) -> None:
    """Raises DataError if prepared rows hold examples, but none in the prompt format of `config`.

    The run's record, by which the model is prompted later, would be wrong.
    """
    found = [(manifest.directory, manifest.settings["examples"]) for manifest in manifests
             if manifest.settings["examples"]["format"] != "none"]
    asked = dataclasses.asdict(config.examples)
    wrong = [[name for name in ("format", "separator", "split_digits", "chat_template") if asked[name] != used[name]]
             for _, used in found]
    if found and all(wrong):
        (directory, used), (name, *_) = found[0], wrong[0]
        raise DataError(f"the rows in {directory} were prepared with examples.{name}={used[name]!r}, but data.examples."
                        f"{name} is {asked[name]!r}; set data.examples.{name} to the former")
