"""The data of lm-eval's tasks in local files: where a task's file is, its rows, and rows in the fields of the task.

A folder of data has, for a task or for the benchmark that it asks about, NAME.jsonl or NAME/ with a file whose name has
a split in it: hellaswag/val.jsonl, gsm8k/test.jsonl and gsm8k/train.jsonl for its examples.
"""

import csv
import hashlib
import json
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from dlm_jax.data.records import BadRecord, BrokenSource, get_text, parse_record
from dlm_jax.data.sources import open_sources, read_chunks
from dlm_jax.errors import DataError
from dlm_jax.evaluation.metrics import first_sentence

SUFFIXES = (".jsonl", ".json", ".parquet", ".arrow", ".csv", ".txt")
_COMPRESSED = (".jsonl", ".json")  # also as .gz
_EVALUATED = ("validation", "valid", "val", "dev", "test")
_TEST_FIRST = ("test", *_EVALUATED[:-1])

Fields = Mapping[str, Any]


class Source(NamedTuple):
    """Where the data of a benchmark may be.

    Attributes:
      folders: folders of a data directory, or names of files in it.
      splits: words in a file's name, the preferred one first.
    """

    folders: tuple[str, ...]
    splits: tuple[str, ...] = _EVALUATED


_SOURCES = {
    "lambada": Source(("lambada",), ("test",)),
    "gsm8k": Source(("gsm8k",), ("test",)),
    "gsm8k_icot": Source(("gsm8k_icot",), ("test",)),
    "social_iqa": Source(("social_iqa", "siqa", "social_i_qa", "socialiqa")),
    "triviaqa": Source(("triviaqa", "trivia_qa")),
    "rocstories": Source(("rocstories", "rocstories_cloze")),
    "humaneval_fim_single_line": Source(("humaneval_infilling",), ("singlelineinfilling",)),
    "humaneval_fim_multi_line": Source(("humaneval_infilling",), ("multilineinfilling",)),
    "humaneval_fim_random_span": Source(("humaneval_infilling",), ("randomspaninfilling",)),
    "humaneval_fim_random_span_light": Source(("humaneval_infilling",), ("randomspaninfillinglight",)),
    "humaneval": Source(("humaneval",), _TEST_FIRST),
    "mbpp": Source(("mbpp",), _TEST_FIRST),
    "reconstruction": Source(("reconstruction", "text")),
    "generation": Source(("generation", "text")),
}
# lm-eval's tasks that ask about the same data, by the start of their name.
_SAME_DATA = {"lambada_": "lambada", "gsm8k_cot": "gsm8k", "humaneval_6": "humaneval", "squad": "squad"}
REFERENCE_PREFIX = "diffullama_"  # see `reference_protocol`


def benchmark_of(task: str) -> str:
    """Returns the name of the data that a task asks about: "lambada" for lambada_openai."""
    name = task.removeprefix(REFERENCE_PREFIX)
    if name in _SOURCES:
        return name
    return next((data for start, data in _SAME_DATA.items() if name.startswith(start)), name)


def find_file(task: str, data_dir: str, splits: Sequence[str] | None = None) -> str:
    """Returns the task's file in a data directory: DIR/NAME.jsonl, or DIR/NAME/ and a name with a word of `splits`.

    Raises:
      DataError: no file matches, or several match equally well.
    """
    source = _SOURCES.get(benchmark_of(task), Source((benchmark_of(task),)))
    asked, folder = splits or source.splits, pathlib.Path(data_dir)
    if not folder.is_dir():
        raise DataError(f"there is no folder {data_dir}; name the one that holds the tasks' files with --data_dir")
    files = [path for name in source.folders for path in [*folder.glob(f"{name}.*"), *(folder / name).glob("*")]
             if kind_of(path) and path.name not in ("SOURCE.txt", "README.txt")]
    for split in asked:
        if found := sorted(str(path) for path in files if split in re.split(r"[-_.]", path.name.lower())):
            return _only(task, found)
    unsplit = sorted(str(path) for path in files if "train" not in path.stem.lower())
    if unsplit and splits is None:
        return _only(task, unsplit)
    places = " or ".join(str(folder / name) for name in source.folders)
    what_to_do = f"name it with --data_files {task}=FILE" if splits is None else "put one there"
    raise DataError(f"no file of the task {task} at {places} ({', '.join(SUFFIXES)}; of {', '.join(asked)}); "
                    f"{what_to_do}")


def load_rows(task: str, path: str) -> list[dict[str, Any]]:
    """Returns the rows of a file in the fields that the task's templates read.

    Raises:
      DataError: the file cannot be read, has no row, or a row is malformed (the error names its file and line).
    """
    convert = _CONVERTED.get(benchmark_of(task), lambda fields: [fields])
    rows = []
    for row in read_rows(path):
        try:
            rows += convert(row.fields)
        except BadRecord as error:
            raise DataError(f"{row.where}: {error}, for the task {task}") from error
    if not rows:
        raise DataError(f"{path} has no items for the task {task}")
    return rows


def is_cleaned(task: str, rows: Sequence[Fields]) -> bool:
    """Returns whether rows are what the task's `process_docs` makes, so that it must not run again."""
    return benchmark_of(task) == "hellaswag" and "query" in rows[0]


class Row(NamedTuple):
    """A row of a task's file: `fields` by name (`text` for a line of a .txt file); `where` is its file and line."""

    fields: dict[str, Any]
    where: str


def kind_of(file: pathlib.Path) -> str | None:
    """Returns which of SUFFIXES a file has, ignoring .gz after .jsonl and .json; None: none of them."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes[-1:] == [".gz"]:
        return suffixes[-2] if suffixes[-2:-1] and suffixes[-2] in _COMPRESSED else None
    return suffixes[-1] if suffixes and suffixes[-1] in SUFFIXES else None


def is_named(path: str) -> bool:
    """Returns whether this names a dataset, `hf:NAME?name=&split=` or `tfds:NAME?split=`, and not a file."""
    return path.startswith(("hf:", "tfds:"))


def digest(path: str) -> str:
    """Returns a SHA-256 prefix of a file's content, or of the identity of a named dataset."""
    if is_named(path):
        source, = open_sources([path])
        return hashlib.sha256(json.dumps(source.identity).encode()).hexdigest()[:16]
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def read_rows(path: str) -> list[Row]:
    """Returns all rows of a dataset by name, or of a file: .jsonl, .json (also .gz), .parquet, .arrow, .csv, .txt.

    A line of a .txt file is a row. Blank lines are skipped. Labels in a separate file (valid.jsonl, valid-labels.lst)
    become the field `label`.

    Raises:
      DataError: there is no such file, it cannot be read, or a row is malformed.
    """
    if is_named(path):
        return list(_record_rows(path))
    file = pathlib.Path(path)
    if not file.is_file():
        raise DataError(f"there is no file {path}")
    if kind_of(file) is None:
        raise DataError(f"{path} has none of the suffixes of a task file: {', '.join(SUFFIXES)}, .jsonl.gz, .json.gz")
    reader = {".csv": _csv_rows, ".txt": _text_rows}.get(kind_of(file), _record_rows)
    try:
        rows = list(reader(file))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    labels = file.with_name(f"{file.stem}-labels.lst")
    if not labels.is_file() or any("label" in row.fields for row in rows):
        return rows
    values = labels.read_text().split()
    if len(values) != len(rows):
        raise DataError(f"{labels} has {len(values)} labels for the {len(rows)} rows of {file.name}")
    return [Row({**row.fields, "label": value}, row.where) for row, value in zip(rows, values, strict=True)]


def _record_rows(path: str | pathlib.Path) -> Iterator[Row]:
    source, = open_sources([str(path)])
    try:
        for chunk in read_chunks(source):
            for number, raw in enumerate(chunk.records, chunk.first):
                where = chunk.location(number)
                try:
                    record = parse_record(raw)
                except BadRecord as error:
                    raise DataError(f"{where}: {error}") from error
                if record == "":
                    continue
                yield Row({"text": record} if isinstance(record, str) else record, where)
    except BrokenSource as error:
        raise DataError(str(error)) from error


def _csv_rows(file: pathlib.Path) -> Iterator[Row]:
    with file.open(newline="", encoding="utf-8-sig") as stream:
        reader = csv.DictReader(stream, strict=True)
        try:
            for fields in reader:
                where = f"{file}, line {reader.line_num}"
                if None in fields or None in fields.values():
                    raise DataError(f"{where}: the number of values differs from the header's {len(reader.fieldnames)} "
                                    "columns")
                yield Row(fields, where)
        except csv.Error as error:
            raise DataError(f"{file}, line {reader.line_num}: not CSV ({error})") from error


def _text_rows(file: pathlib.Path) -> Iterator[Row]:
    with file.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                yield Row({"text": line.rstrip("\n")}, f"{file}, line {number}")


def _hellaswag(fields: Fields) -> list[Fields]:
    """Reads the original's fields, or {query, choices, gold}, which are already cleaned (`is_cleaned`)."""
    if "query" not in fields:
        _index(fields, "label", 4)
        return [fields]
    if not isinstance(fields.get("choices"), list):
        raise BadRecord("no list of texts under 'choices'")
    gold = _index(fields, "gold", len(fields["choices"]))
    return [{"query": get_text(fields, "query"), "choices": fields["choices"], "gold": gold, "label": str(gold)}]


def _winogrande(fields: Fields) -> list[Fields]:
    if "_" not in get_text(fields, "sentence"):
        raise BadRecord("no _ in the sentence")
    _index(fields, "answer", 2, first=1)
    return [{**fields, "answer": str(fields["answer"])}]


def _piqa(fields: Fields) -> list[Fields]:
    return [{**fields, "label": _index(fields, "label", 2)}]


def _social_iqa(fields: Fields) -> list[Fields]:
    _index(fields, "label", 3, first=1)
    return [{**fields, "label": str(fields["label"])}]


def _triviaqa(fields: Fields) -> list[Fields]:
    """Reads {question, answer: {aliases}}, or {context: "Question: ...?\\nAnswer:", answer, aliases}."""
    if "question" in fields:
        if not isinstance(fields.get("answer"), dict):
            raise BadRecord("no {value, aliases} under 'answer'")
        return [{**fields, "question": get_text(fields, "question").rstrip("?")}]
    question = get_text(fields, "context").removeprefix("Question: ").removesuffix("\nAnswer:").rstrip("?")
    aliases = fields.get("aliases") or []
    value = get_text(fields, "answer")
    return [{"question": question, "answer": {"value": value, "aliases": list(dict.fromkeys([value, *aliases]))}}]


def _squad(fields: Fields) -> list[Fields]:
    """Reads the questions of SQuAD's original file, {data: [{paragraphs: [{context, qas}]}]}, or a question."""
    if "data" not in fields:
        return [fields]
    try:
        return [{**question, "context": paragraph["context"],
                 "answers": {"text": [answer["text"] for answer in question["answers"]]}}
                for article in fields["data"] for paragraph in article["paragraphs"] for question in paragraph["qas"]]
    except (KeyError, TypeError) as error:
        raise BadRecord(f"not SQuAD's format ({error})") from error


def _gsm8k_icot(fields: Fields) -> list[Fields]:
    question, bar, solution = get_text(fields, "text").partition("||")
    if not bar:
        raise BadRecord("no || between question and answer")
    return [{"question": question.strip(), "answer": solution.strip()}]


def _gsm8k(fields: Fields) -> list[Fields]:
    if "####" not in get_text(fields, "answer"):
        raise BadRecord("no answer after ####")
    return [{**fields, "question": get_text(fields, "question")}]


def _rocstories(fields: Fields) -> list[Fields]:
    _index(fields, "AnswerRightEnding", 2, first=1)
    return [{**fields, **{f"InputSentence{n}": get_text(fields, f"InputSentence{n}").strip() for n in range(1, 5)}}]


def _texts(fields: Fields) -> list[Fields]:
    return [{**fields, "text": get_text(fields, "text")}]


def _opening(fields: Fields) -> list[Fields]:
    """Reads {prompt}, perhaps empty; or {text}, whose first sentence becomes the prompt."""
    if "prompt" not in fields:
        return [{"prompt": first_sentence(get_text(fields, "text"))}]
    if not isinstance(fields["prompt"], str):
        raise BadRecord("no text under 'prompt'")
    return [{"prompt": fields["prompt"]}]


_CONVERTED: dict[str, Callable[[Fields], list[Fields]]] = {
    "hellaswag": _hellaswag, "winogrande": _winogrande, "piqa": _piqa, "social_iqa": _social_iqa, "lambada": _texts,
    "triviaqa": _triviaqa, "squad": _squad, "gsm8k": _gsm8k, "gsm8k_icot": _gsm8k_icot, "rocstories": _rocstories,
    "text": _texts, "reconstruction": _texts, "generation": _opening,
}


def _index(fields: Fields, key: str, count: int, first: int = 0) -> int:
    """Returns the index of the right option, a number or its digits, which the file counts from `first`."""
    value = fields.get(key)
    if not (isinstance(value, int) or (isinstance(value, str) and value.strip().isdecimal())):
        raise BadRecord(f"{value!r} under {key!r} where the number of the right option was expected")
    if not 0 <= int(value) - first < count:
        raise BadRecord(f"{value} under {key!r}, and the options are {first} .. {first + count - 1}")
    return int(value) - first


def _only(task: str, found: Sequence[str]) -> str:
    if len(found) > 1:
        raise DataError(f"several files may be the task {task}: {', '.join(found)}; name one with --data_files "
                        f"{task}=FILE")
    return found[0]
