"""Datasets that are known by a name: those of TensorFlow Datasets, and those of Hugging Face."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dlm_jax.data.sources.reading import Reader, columns_in, one_line
from dlm_jax.errors import DataError

_BATCH = 256


def parse_spec(spec: str, known: Sequence[str]) -> tuple[str, dict[str, str]]:
    """(the name, the options) of `KIND:NAME?key=value&key=value`. Nothing is unescaped: splits hold % and +.

    Raises:
      DataError: there is no name, or an option is unknown.
    """
    name, _, query = spec.partition(":")[2].partition("?")
    options = dict(option.partition("=")[::2] for option in query.split("&") if option)
    if not name:
        raise DataError(f"{spec!r} names no dataset; write {spec.partition(':')[0]}:NAME")
    for key, value in options.items():
        if key not in known or not value:
            raise DataError(f"{spec}: {key!r} is not an option with a value; there are {', '.join(known)}, as in "
                            f"?{known[0]}=VALUE&{known[1]}=VALUE")
    return name, options


class TfdsSource(Reader):
    """`tfds:NAME[/CONFIG][:VERSION]?split=train&data_dir=DIR`: what tfds has prepared, read without TensorFlow."""

    unit = "example"
    _reached = 0

    def __init__(self, spec: str):
        name, options = parse_spec(spec, ("split", "data_dir"))
        split, folder = options.get("split", "train"), options.get("data_dir")
        from tensorflow_datasets.core import read_only_builder  # from files alone, without a dataset's own code
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
                            f"prepare it anew: {remedy}") from error
        except ValueError as error:
            raise DataError(f"{spec}: no split {split!r} (it has {', '.join(builder.info.splits)})") from error
        self.name, self.size = spec, len(self._examples)
        self._features = builder.info.features
        self._identity = [str(builder.data_dir), split, self.size, int(builder.info.dataset_size)]

    def identity(self) -> list:
        return self._identity

    def done(self) -> int:
        return self._reached

    def _read(self, start: int, columns: Sequence[str] | None) -> Iterator[dict[str, Any]]:
        from tensorflow_datasets.core.features import FeaturesDict

        wanted = columns_in(self.name, list(self._features), columns) or list(self._features)
        parser = FeaturesDict({key: self._features[key] for key in wanted})  # decodes nothing else
        self._reached = start
        for first in range(start, self.size, _BATCH):
            numbers = range(first, min(first + _BATCH, self.size))
            for stored in self._examples.__getitems__(numbers):
                self._reached += 1
                yield _plain(parser.deserialize_example_np(stored), parser)


class HuggingFaceSource(Reader):
    """`hf:NAME?name=CONFIG&split=train&...`: a dataset of the Hugging Face hub, or a folder of files, as a stream."""

    unit = "example"
    _reached = 0

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
        self._identity = [spec, builder.config_id, str(builder.info.version), builder.hash, self.size]

    def identity(self) -> list:
        return self._identity

    def done(self) -> int:
        return self._reached

    def _read(self, start: int, columns: Sequence[str] | None) -> Iterator[dict[str, Any]]:
        examples = self._examples
        if examples.column_names:  # else it is not known before reading, and nothing is left out
            wanted = columns_in(self.name, examples.column_names, columns)
            examples = examples.select_columns(wanted) if wanted else examples
        self._reached = start
        # As Arrow tables, which is ten times as fast, and decodes no pictures.
        for table in examples.with_format("arrow").skip(start).iter(_BATCH):
            for example in table.to_pylist():
                self._reached += 1
                yield example


def _plain(value: Any, feature: Any) -> Any:
    """A value of tfds as Python's own: bytes as text where they are, a sequence of records as a list of dicts."""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist(), feature)
    if isinstance(value, dict):
        inner = getattr(feature, "feature", feature)  # of a Sequence, which tfds turns into a dict of lists
        columns = {key: _plain(item, inner[key]) for key, item in value.items()}
        if inner is feature:
            return columns
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    if isinstance(value, Sequence):
        return [_plain(item, getattr(feature, "feature", feature)) for item in value]
    return value
