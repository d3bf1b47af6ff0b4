"""Which source of raw records a specification means, and the datasets that are known by name.

FILE or GLOB                                        .txt .jsonl .json (also .gz, .zst) .parquet .arrow; any fsspec URL
tfds:NAME[/CONFIG][:VERSION]?split=&data_dir=       prepared by TensorFlow Datasets
hf:NAME?name=&split=&data_dir=&data_files=&revision=   of the Hugging Face hub, or a folder
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dlm_jax.data.files import COMPRESSED, File, find_files, one_line
from dlm_jax.data.records import BrokenSource, RawRecord, RecordChunk
from dlm_jax.data.source_files import (
    ArrowSource,
    JsonSource,
    LineSource,
    ParquetSource,
    Source,
    TextSource,
    select_columns,
)
from dlm_jax.errors import DataError

_CHUNK_BYTES = 1 << 20
_CHUNK_RECORDS = 4096
_BATCH = 256  # examples of a dataset that are read at a time


def open_sources(specs: Sequence[str], *, separator: str = "") -> list[Source]:
    """Returns the sources that specifications name, in their order, those of a glob sorted, each once.

    Args:
      separator: text between the documents of a .txt file; empty: the file is one document.

    Raises:
      DataError: a specification names nothing that exists, or nothing that can be read.
    """
    sources: dict[str, Source] = {}
    for spec in specs:
        if open_dataset := _DATASETS.get(spec.partition(":")[0] if "://" not in spec else ""):
            if spec not in sources:
                sources[spec] = open_dataset(spec)
            continue
        for file in find_files(spec):
            if file.key not in sources:
                sources[file.key] = _open_file(file, separator)
    return list(sources.values())


def read_chunks(source: Source, start: int = 0, columns: Sequence[str] | None = None,
                max_bytes: int = _CHUNK_BYTES) -> Iterator[RecordChunk]:
    """Yields the records from number `start` on in chunks of about `max_bytes`.

    Raises:
      BrokenSource: the source is damaged; the records before that have been yielded.
      DataError: it cannot be read.
    """
    first, records, held, broken = start + 1, [], 0, None
    try:
        for record in source.records(start, columns):
            records.append(record)
            held += _memory_bytes(record)
            if held >= max_bytes or len(records) == _CHUNK_RECORDS:
                yield RecordChunk(source.name, source.unit, first, records)
                first, records, held = first + len(records), [], 0
    except BrokenSource as error:
        broken = error
    if records:
        yield RecordChunk(source.name, source.unit, first, records)
    if broken:
        raise broken


def _memory_bytes(record: RawRecord | Any) -> int:
    """Estimates the memory of a record."""
    if isinstance(record, bytes | str):
        return len(record)
    if isinstance(record, dict):
        return sum(map(_memory_bytes, record.values()))
    return sum(map(_memory_bytes, record)) if isinstance(record, list) else 8


class TfdsSource(Source):
    """`tfds:NAME[/CONFIG][:VERSION]?split=train&data_dir=DIR`: what tfds has prepared, read without TensorFlow."""

    unit = "example"

    def __init__(self, spec: str):
        name, options = parse_spec(spec, ("split", "data_dir"))
        split, folder = options.get("split", "train"), options.get("data_dir")
        from tensorflow_datasets.core import read_only_builder  # reads files alone, without a dataset's own code
        from tensorflow_datasets.core.decode import DeserializeMethod

        remedy = f"tfds build {name.partition(':')[0]} --file_format=array_record"
        remedy += f" --data_dir={folder}" if folder else ""
        try:
            builder = read_only_builder.builder_from_files(name, data_dir=folder and str(Path(folder).expanduser()))
        except ValueError as error:
            raise DataError(f"{spec} is not prepared in {folder or 'the data directory of tfds'}; prepare it where "
                            f"TensorFlow is installed ({remedy}), or set ?data_dir=DIR") from error
        try:
            self._examples = builder.as_data_source(split, deserialize_method=DeserializeMethod.RAW_BYTES)
        except NotImplementedError as error:
            raise DataError(f"{spec} is stored in a format that needs TensorFlow ({builder.info.file_format.value}); "
                            f"prepare it again: {remedy}") from error
        except ValueError as error:
            raise DataError(f"{spec}: no split {split!r} (it has {', '.join(builder.info.splits)})") from error
        self.name, self.size = spec, len(self._examples)
        self._features = builder.info.features
        self.identity = [str(builder.data_dir), split, self.size, int(builder.info.dataset_size)]

    def _read(self, start: int, columns: Sequence[str] | None) -> Iterator[dict[str, Any]]:
        from tensorflow_datasets.core.features import FeaturesDict

        selected = select_columns(self.name, list(self._features), columns) or list(self._features)
        parser = FeaturesDict({key: self._features[key] for key in selected})  # decodes nothing else
        self.consumed = start
        for first in range(start, self.size, _BATCH):
            for stored in self._examples.__getitems__(range(first, min(first + _BATCH, self.size))):
                self.consumed += 1
                yield _to_python(parser.deserialize_example_np(stored), parser)


class HuggingFaceSource(Source):
    """`hf:NAME?name=CONFIG&split=train&...`: a dataset of the Hugging Face hub, or a folder of files, as a stream."""

    unit = "example"

    def __init__(self, spec: str):
        path, options = parse_spec(spec, ("name", "split", "data_dir", "data_files", "revision"))
        split = options.pop("split", "train")
        try:
            import datasets
        except ImportError as error:
            raise DataError(f"{spec} needs the package datasets: pip install 'dlm-jax[datasets]'") from error
        if path.startswith("~"):
            path = str(Path(path).expanduser())
        try:
            builder = datasets.load_dataset_builder(path, **options)
            self._examples = builder.as_streaming_dataset(split)
        except Exception as error:  # of the hub, the network, the files; a bad split's error lists the splits
            raise DataError(f"{spec} cannot be opened: {one_line(error)}") from error
        known = (builder.info.splits or {}).get(split)
        self.name, self.size = spec, known.num_examples if known else None
        self.identity = [spec, builder.config_id, str(builder.info.version), builder.hash, self.size]

    def _read(self, start: int, columns: Sequence[str] | None) -> Iterator[dict[str, Any]]:
        examples = self._examples
        if examples.column_names:  # else unknown before reading, and all are read
            selected = select_columns(self.name, examples.column_names, columns)
            examples = examples.select_columns(selected) if selected else examples
        self.consumed = start
        # Arrow tables are ten times as fast as examples, and no images are decoded.
        for table in examples.with_format("arrow").skip(start).iter(_BATCH):
            for example in table.to_pylist():
                self.consumed += 1
                yield example


def parse_spec(spec: str, known: Sequence[str]) -> tuple[str, dict[str, str]]:
    """Parses `KIND:NAME?key=value&key=value` into (name, options). Nothing is unescaped: splits contain % and +.

    Raises:
      DataError: there is no name, or an option is unknown.
    """
    name, _, query = spec.partition(":")[2].partition("?")
    options = dict(option.partition("=")[::2] for option in query.split("&") if option)
    if not name:
        raise DataError(f"{spec!r} names no dataset; write {spec.partition(':')[0]}:NAME")
    for key, value in options.items():
        if key not in known or not value:
            raise DataError(f"{spec}: {key!r} is not an option with a value; the options are {', '.join(known)}, as in "
                            f"?{known[0]}=VALUE&{known[1]}=VALUE")
    return name, options


def _to_python(value: Any, feature: Any) -> Any:
    """Converts a value of tfds: bytes to text if they are UTF-8, a sequence of records to a list of dicts."""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value
    if isinstance(value, np.ndarray | np.generic):
        return _to_python(value.tolist(), feature)
    if isinstance(value, dict):
        inner = getattr(feature, "feature", feature)  # of a Sequence, which tfds stores as a dict of lists
        columns = {key: _to_python(item, inner[key]) for key, item in value.items()}
        if inner is feature:
            return columns
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    if isinstance(value, Sequence):
        return [_to_python(item, getattr(feature, "feature", feature)) for item in value]
    return value


def _open_file(file: File, separator: str) -> Source:
    if file.suffix == ".txt":
        return TextSource(file, separator)
    if file.suffix not in _FILES or (file.suffix in _TABLES and file.compression):
        raise DataError(f"{file.name}: not a kind of file this reads (.txt, .jsonl, .json, each also "
                        f"{' or '.join(COMPRESSED)}; {', '.join(_TABLES)})")
    return _FILES[file.suffix](file)


_DATASETS: dict[str, Callable[[str], Source]] = {"tfds": TfdsSource, "hf": HuggingFaceSource}
_FILES: dict[str, Callable[[File], Source]] = {
    ".jsonl": LineSource, ".json": JsonSource, ".parquet": ParquetSource, ".arrow": ArrowSource}
_TABLES = (".parquet", ".arrow")  # compressed internally
