"""What a directory of prepared rows is: one small JSON file, written last; without it the directory is not finished."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlm_jax.data import tokenize
from dlm_jax.data.config import RowsConfig
from dlm_jax.data.encode import Form
from dlm_jax.data.remote import fetch_files, read_file, write_file
from dlm_jax.data.shards import RowFiles, RowLayout, Shard
from dlm_jax.data.sources import Source
from dlm_jax.errors import DataError
from dlm_jax.storage import cache_folder, is_remote

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILE = "manifest.json"
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
        write_file(f"{directory}/{FILE}", (json.dumps(content, indent=1) + "\n").encode())

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


def read(directory: str) -> Manifest | None:
    """The manifest of a directory, or None where there is none.

    Raises:
      DataError: it is damaged, or of another version.
    """
    path = f"{directory}/{FILE}"
    content = read_file(path)
    if content is None:
        return None
    try:
        facts = json.loads(content)
        if facts.pop("format") != FORMAT:
            raise DataError(f"{path} was written by another version of dlm_jax; prepare the corpus again")
        facts["layout"] = RowLayout(**facts["layout"] | {"planes": tuple(facts["layout"]["planes"])})
        facts["parts"] = {name: Part(**part | {"shards": tuple(Shard(**shard) for shard in part["shards"])})
                          for name, part in facts["parts"].items()}
        return Manifest(**facts | {key: tuple(facts[key]) for key in ("sources", "bad_records")})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is not a manifest of prepared rows ({error}); prepare the corpus again") from error


def identity_of(sources: Sequence[Source], tokenizer: "PreTrainedTokenizerBase", config: RowsConfig, form: Form) -> str:
    """A hash of all that decides the rows: the sources' content, the tokenizer, the settings."""
    settings = dataclasses.asdict(config)
    settings.pop("bad_records")  # a run that met one may go on with another policy
    facts = [FORMAT, [source.identity() for source in sources], tokenize.fingerprint(tokenizer), settings, form.facts]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:20]


def rows_config(config: RowsConfig, validation_fraction: float) -> RowsConfig:
    """The part of `config`, perhaps a `DataConfig`, that decides the rows."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(RowsConfig)}
    return RowsConfig(**values | {"validation_fraction": validation_fraction})


def check_fit(manifest: Manifest, directory: str, config: RowsConfig, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raises DataError where prepared rows do not fit what training asks for."""
    made = manifest.tokenizer
    if made["fingerprint"] != tokenize.fingerprint(tokenizer):
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
