"""Rows of a task's file or dataset, each with where it stands, for messages."""

import csv
import dataclasses
import hashlib
import itertools
import json
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

from dlm_jax.data.records import BadRecord, BrokenSource, parse_record
from dlm_jax.data.sources import open_sources, read_chunks
from dlm_jax.errors import ConfigError, DataError
from dlm_jax.evaluation import items
from dlm_jax.evaluation.code_execution import humaneval_infilling
from dlm_jax.evaluation.generation import opening
from dlm_jax.evaluation.items import Fields, Item

SUFFIXES = (".jsonl", ".json", ".parquet", ".arrow", ".csv", ".txt")
_COMPRESSED = (".jsonl", ".json")  # also as .gz


class Row(NamedTuple):
    """`fields` by name (a line of a .txt file is its `text`); `where` is the file and the line or row."""

    fields: dict[str, Any]
    where: str


def kind_of(file: pathlib.Path) -> str | None:
    """Which of SUFFIXES a file has, of .jsonl.gz and .json.gz the first; None: none of them."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes[-1:] == [".gz"]:
        return suffixes[-2] if suffixes[-2:-1] and suffixes[-2] in _COMPRESSED else None
    return suffixes[-1] if suffixes and suffixes[-1] in SUFFIXES else None


def is_named(path: str) -> bool:
    """Whether it is not a file but a dataset by name, `hf:NAME?name=&split=` or `tfds:NAME?split=`."""
    return path.startswith(("hf:", "tfds:"))


def digest(path: str) -> str:
    """What changes when the rows do: of a file's content, or of what a named dataset says of itself."""
    if is_named(path):
        source, = open_sources([path])
        return hashlib.sha256(json.dumps(source.identity).encode()).hexdigest()[:16]
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def read_rows(path: str) -> list[Row]:
    """All rows of a file: .jsonl, .json (also .gz), .parquet, .arrow, .csv, or .txt with a record a line; or of a
    dataset by name.

    Blank lines are skipped.

    The labels that some tasks keep in a file beside it (valid.jsonl, valid-labels.lst) become the field `label`.

    Raises:
      DataError: there is no such file, it cannot be read, or a row is malformed.
    """
    if is_named(path):
        return list(_record_rows(path))
    file = pathlib.Path(path)
    if not file.is_file():
        raise DataError(f"there is no file {path}")
    if kind_of(file) is None:
        raise DataError(f"{path} is of no kind that a task may have: {', '.join(SUFFIXES)}, .jsonl.gz, .json.gz")
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
                    raise DataError(f"{where}: not as many values as the {len(reader.fieldnames)} columns of its head")
                yield Row(fields, where)
        except csv.Error as error:
            raise DataError(f"{file}, line {reader.line_num}: not CSV ({error})") from error


def _text_rows(file: pathlib.Path) -> Iterator[Row]:
    with file.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                yield Row({"text": line.rstrip("\n")}, f"{file}, line {number}")


# ---- The tasks by name: where a row comes from, what is asked, and how an answer is judged.
#
# Two protocols ask the same questions. `default` is the one to trust. `release` does what the released scripts do, for
# comparison with the paper (arXiv 2410.17891):
#
#   prompts       HellaSwag's endings have no space before them, PIQA's two; WinoGrande scores the option and the rest
#                 with no space between; SQuAD's prompt says "Quesion"; a lone space ends the prompts of questions
#   tokens        prompt and option are tokenised apart; a tokenizer with BOS puts one before each option of HellaSwag
#                 and PIQA, which is then scored; without BOS nothing stands at position 0 but the prompt
#   scores        the unweighted mean cross-entropy of T = 32 maskings, drawn afresh for every option (release_draw)
#   writing       as many tokens as the reference has; for GSM8K a canvas of 256; temperature 1 (SQuAD, TriviaQA,
#                 LAMBADA), 0.95 or for LLaMA 0.9 (ROCStories, HumanEval), none (GSM8K)
#   parents       the sum of log-probabilities for PIQA and SIQA, their mean for HellaSwag and WinoGrande, where a space
#                 follows the option; as many tokens in a gap as the reference has characters; for HumanEval's gaps they
#                 are asked for "the middle code"
#   items         the first 2000 of SQuAD, the first 1000 of ROCStories; of HumanEval's none with more than 1000 tokens
#                 (left out for the parent as well, so that both answer the same)
#
# MAWPS, SATMath and what asks for reasoning first are not among the released scripts.
#
# Not done as the released scripts do it: writing is by our confidence policy, which ranks masked positions only and so
# reveals as many as scheduled; what `eval-diffugpt.py` does when run whole, where LAMBADA's settings stay in force (T = 1
# for multiple choice and gaps), is had by `--num_masks=1` for multiple choice only. How its LAMBADA prompt ends and how
# the parent writes under it could not be checked.


PROTOCOLS = ("default", "release")


@dataclasses.dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
      kind: "choice" scores options, "write" continues a prompt, "infill" writes between two texts, "text" scores all,
        "reconstruct" finds masked tokens again, "free" writes what a judge scores.
      read: from the fields of a row, and whether the protocol is `release`, to an item.
      metrics: names in `metrics.METRICS` for tasks that write, the one that counts first; samples vote by it.
      executes: programs are completed and run; the metric is `pass_at_1`.
      release_metrics: the same as the released scripts have them.
      lengths: how many tokens may be written, fewest and most.
      temperature: at which they are, under the protocol `default`.
      cut: what of a text is judged: "line" its first, "sentence" its first, "answer" what stands before another
        question, "all".
      folders: folders of a data directory, or names of files in it, where it may lie.
      splits: words of the file's name, the best first.
      hub: the dataset on the Hugging Face hub, with its configuration, and the split that is evaluated.
      flatten: from a row to the rows it holds.
      released: whether the released scripts have it.
      release_limit: how many items they take.
      release_most_tokens: items with more tokens are left out there.
      release_steps, release_temperature: how they write; None for LLaMA's 0.9 and others' 0.95.
      release_normalised: whether their score of the parent is a mean.
      release_bos: whether the tokenizer's BOS stands before the option as well.
    """

    name: str
    kind: Literal["choice", "write", "infill", "text", "reconstruct", "free"]
    read: Callable[[Fields, bool], Item]
    metrics: tuple[str, ...] = ()
    release_metrics: tuple[str, ...] = ()
    lengths: tuple[int, int] = (1, 1)
    executes: bool = False
    temperature: float = 0.0
    cut: Literal["line", "sentence", "answer", "all"] = "line"
    folders: tuple[str, ...] = ()
    splits: tuple[str, ...] = ("validation", "valid", "val", "dev", "test")
    hub: tuple[str, str] | None = None
    flatten: Callable[[Fields], Iterator[Fields]] | None = None
    released: bool = True
    release_limit: int | None = None
    release_most_tokens: int | None = None
    release_steps: int | None = None
    release_temperature: float | None = 1.0
    release_normalised: bool = False
    release_bos: bool = False


_NUMBERS = ("last_number", "stated_number")
_TEST_FIRST = ("test", "validation", "valid", "val", "dev")
_SATMATH = ("satmath", "sat_math", "sat-math")
_GSM8K, _MAWPS = ("openai/gsm8k?name=main", "test"), ("MU-NLPC/Calc-mawps?name=default", "test")
_SATMATH_HUB = ("hails/agieval-sat-math", "test")
_TASKS = (
    Task("hellaswag", "choice", items.hellaswag, hub=("Rowan/hellaswag", "validation"), release_normalised=True,
         release_bos=True),
    Task("winogrande", "choice", items.winogrande, hub=("allenai/winogrande?name=winogrande_xl", "validation"),
         release_normalised=True),
    Task("piqa", "choice", items.piqa, hub=("baber/piqa", "validation"), release_bos=True),
    Task("siqa", "choice", items.siqa, folders=("siqa", "social_i_qa", "socialiqa"),
         hub=("lighteval/siqa", "validation")),
    Task("lambada", "write", items.lambada, ("first_word",), ("stripped_match",), lengths=(1, 8), splits=("test",),
         hub=("EleutherAI/lambada_openai?name=default", "test")),
    Task("triviaqa", "write", items.triviaqa, ("exact_match", "f1", "contains"), ("contains", "f1"), lengths=(1, 16),
         folders=("triviaqa", "trivia_qa"), hub=("mandarjoshi/trivia_qa?name=rc.nocontext", "validation")),
    Task("squad", "write", items.squad, ("exact_match", "f1", "contains"), ("contains", "f1"), lengths=(1, 24),
         flatten=items.squad_questions, hub=("rajpurkar/squad", "validation"), release_limit=2000),
    Task("gsm8k", "write", items.gsm8k, ("marked_number", "last_number"), ("marked_text",), lengths=(1, 256),
         cut="answer", splits=("test",), hub=_GSM8K, release_steps=64, release_temperature=0.0),
    Task("gsm8k_cot", "write", items.gsm8k_cot, _NUMBERS, lengths=(1, 256), cut="answer", folders=("gsm8k",),
         splits=("test",), hub=_GSM8K, released=False),
    Task("gsm8k_icot", "write", items.gsm8k_symbolic, ("marked_number", "last_number"), ("marked_text",),
         lengths=(1, 128), cut="answer", splits=("test",), release_steps=64, release_temperature=0.0),
    Task("mawps", "write", items.mawps, _NUMBERS, lengths=(1, 16), splits=_TEST_FIRST, hub=_MAWPS,
         released=False),
    Task("mawps_cot", "write", items.mawps_cot, _NUMBERS, lengths=(1, 128), cut="answer", folders=("mawps",),
         splits=_TEST_FIRST, hub=_MAWPS, released=False),
    Task("satmath", "write", items.satmath, ("chosen_letter",), lengths=(1, 16), folders=_SATMATH,
         splits=_TEST_FIRST, hub=_SATMATH_HUB, released=False),
    Task("satmath_cot", "write", items.satmath_cot, ("chosen_letter",), lengths=(1, 256), cut="answer",
         folders=_SATMATH, splits=_TEST_FIRST, hub=_SATMATH_HUB, released=False),
    Task("rocstories", "infill", items.rocstories, ("rouge1", "rouge2", "rougeL"), ("rouge1", "rouge2", "rougeL"),
         lengths=(4, 20), cut="sentence", folders=("rocstories", "rocstories_cloze"), release_limit=1000,
         release_steps=32, release_temperature=None),
    Task("humaneval_infilling", "infill", humaneval_infilling, ("pass_at_1",), ("pass_at_1",), executes=True,
         lengths=(3, 40), splits=("singlelineinfilling",), release_most_tokens=1000, release_steps=32,
         release_temperature=None),
    Task("text", "text", items.text),
    Task("reconstruction", "reconstruct", items.text, folders=("reconstruction", "text"), released=False),
    Task("generation", "free", opening, lengths=(128, 128), temperature=1.0,
         folders=("generation", "text"), released=False),
)
TASKS = {task.name: task for task in _TASKS}


def find_task(name: str) -> Task:
    """The task of a name.

    Raises:
      ConfigError: there is none.
    """
    if name not in TASKS:
        raise ConfigError(f"there is no task {name!r}; the tasks are {', '.join(TASKS)}")
    return TASKS[name]


def find_file(task: Task, data_dir: str, splits: Sequence[str] | None = None) -> str:
    """The task's file in a data directory: DIR/TASK.jsonl, or the one in DIR/TASK/ whose name has a word of `splits`.

    Raises:
      DataError: there is none, or several that suit equally well.
    """
    splits, folder = splits or task.splits, pathlib.Path(data_dir)
    names = task.folders or (task.name,)
    if not folder.is_dir():
        raise DataError(f"there is no folder {data_dir}; name the one that holds the tasks' files with --data_dir")
    files = [path for name in names for path in [*folder.glob(f"{name}.*"), *(folder / name).glob("*")]
             if kind_of(path) and path.name not in ("SOURCE.txt", "README.txt")]
    for split in splits:
        if found := sorted(str(path) for path in files if split in re.split(r"[-_.]", path.name.lower())):
            return _only(task, found)
    whole = [str(path) for path in files if "train" not in path.stem.lower()]
    if whole and splits is task.splits:
        return _only(task, sorted(whole))
    places = " or ".join(f"{folder / name}" for name in names)
    what_to_do = f"name it with --data_files {task.name}=FILE" if splits is task.splits else "put one there"
    raise DataError(f"no file of the task {task.name} at {places} ({', '.join(SUFFIXES)}; of {', '.join(splits)}); "
                    f"{what_to_do}")


def hub_spec(task: Task, split: str | None = None) -> str | None:
    """The task's dataset on the hub, as `rows.read_rows` takes it; None: it is not there in a form that is read here.

    Args:
      split: None: the one that is evaluated.
    """
    if task.hub is None:
        return None
    name, evaluated = task.hub
    return f"hf:{name}{'&' if '?' in name else '?'}split={split or evaluated}"


def load_items(task: Task, path: str, *, release: bool = False, limit: int | None = None) -> list[Item]:
    """The first `limit` items of a file, under the protocol `release` no more than the released scripts take.

    Raises:
      DataError: the file cannot be read, a row is malformed (its file and line are named), or there is no item.
    """
    most = min((n for n in (limit, task.release_limit if release else None) if n is not None), default=None)
    found = list(itertools.islice((item for row in read_rows(path) for item in _items(task, row, release)), most))
    if not found:
        raise DataError(f"{path} has no items for the task {task.name}")
    return found


def shots_prefix(shown: Sequence[Item]) -> str:
    """Examples that stand before every prompt, blank lines between.

    Raises:
      DataError: one has no solution to show.
    """
    for number, item in enumerate(shown):
        if not item.options and not item.solution:
            raise DataError(f"example {number} has no reasoning to show; write examples by hand, in a --prompt_file")
    return "".join(item.shown.strip() + "\n\n" for item in shown)


def _items(task: Task, row: Row, release: bool) -> Iterator[Item]:
    try:
        for fields in task.flatten(row.fields) if task.flatten else [row.fields]:
            yield task.read(fields, release)
    except BadRecord as error:
        raise DataError(f"{row.where}: {error}, for the task {task.name}") from error


def _only(task: Task, found: Sequence[str]) -> str:
    if len(found) > 1:
        raise DataError(f"several files may be the task {task.name}: {', '.join(found)}; name one with --data_files "
                        f"{task.name}=FILE")
    return found[0]
