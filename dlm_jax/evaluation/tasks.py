"""The tasks by name: where their rows come from, what is asked, and how an answer is judged.

Two protocols ask the same questions. `default` is the recommended one. `reference` follows the DiffuLLaMA reference
scripts, for comparison with the paper (arXiv 2410.17891):

  prompts       HellaSwag's endings have no space before them, PIQA's two; WinoGrande scores the option and the rest of
                the sentence without a space between them; SQuAD's prompt says "Quesion"; the prompts of questions end
                with a space
  tokens        prompt and option are tokenized separately; a tokenizer with BOS adds one before each option of
                HellaSwag and PIQA, which is then scored; without BOS position 0 holds the prompt's first token
  scores        the unweighted mean cross-entropy of T = 32 maskings, with noise of its own for each option
                (`scoring.reference_masks`)
  generation    as many tokens as the solution has; 256 with the prompt for GSM8K; temperature 1 (SQuAD, TriviaQA,
                LAMBADA), 0.95 or for LLaMA 0.9 (ROCStories, HumanEval), 0 (GSM8K)
  parents       the sum of log-probabilities for PIQA and SIQA, their mean for HellaSwag and WinoGrande, where a space
                follows the option; as many tokens in a gap as the solution has characters; for HumanEval's gaps the
                prompt asks for "the middle code"
  items         the first 2000 of SQuAD, the first 1000 of ROCStories; for HumanEval none with more than 1000 tokens
                (skipped for the parent as well, so that both answer the same items)

The reference scripts do not have MAWPS, SATMath and the tasks that ask for reasoning first.

Differences from the reference scripts: generation uses our confidence policy, which ranks masked positions only and so
reveals as many as scheduled. `eval-diffugpt.py` in one run keeps LAMBADA's settings for the tasks after it (T = 1 for
multiple choice and gaps); `--num_masks=1` reproduces this for multiple choice only. Two things could not be verified:
how its LAMBADA prompt ends, and how the parent generates under it.
"""

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
from dlm_jax.evaluation.generation import opening
from dlm_jax.evaluation.items import Fields, Item

SUFFIXES = (".jsonl", ".json", ".parquet", ".arrow", ".csv", ".txt")
_COMPRESSED = (".jsonl", ".json")  # also as .gz


@dataclasses.dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
      kind: "choice" scores options, "generate" continues a prompt, "infill" generates between two texts, "text" scores
        all of a text, "reconstruct" predicts masked tokens, "open_ended" generates texts that a judge scores.
      read: makes an item of the fields of a row; its second argument says whether the protocol is `reference`.
      metrics: names in `metrics.METRICS` for tasks that generate, the main one first; samples vote by it.
      reference_metrics: the metrics under `reference`.
      lengths: fewest and most tokens of a generated text.
      executes: whether programs are completed and run; the metric is `pass_at_1`.
      temperature: sampling temperature under `default`.
      truncate: which of a generated text is judged: its first "line" or "sentence", the "answer" before another
        question, or "all".
      folders: folders of a data directory, or names of files in it, that may hold the task.
      splits: words in the file's name, the preferred one first.
      hub: the dataset on the Hugging Face hub, with its configuration, and the evaluated split.
      flatten: expands a row that holds several.
      in_reference: whether the reference scripts have the task.
      reference_limit: number of items that they use.
      reference_max_tokens: items with more tokens are skipped there.
      reference_steps, reference_temperature: how they generate; None for LLaMA's 0.9 and others' 0.95.
      reference_normalized: whether their score of the parent is a mean over tokens.
      reference_bos: whether the tokenizer's BOS precedes the option as well.
    """

    name: str
    kind: Literal["choice", "generate", "infill", "text", "reconstruct", "open_ended"]
    read: Callable[[Fields, bool], Item]
    metrics: tuple[str, ...] = ()
    reference_metrics: tuple[str, ...] = ()
    lengths: tuple[int, int] = (1, 1)
    executes: bool = False
    temperature: float = 0.0
    truncate: Literal["line", "sentence", "answer", "all"] = "line"
    folders: tuple[str, ...] = ()
    splits: tuple[str, ...] = ("validation", "valid", "val", "dev", "test")
    hub: tuple[str, str] | None = None
    flatten: Callable[[Fields], Iterator[Fields]] | None = None
    in_reference: bool = True
    reference_limit: int | None = None
    reference_max_tokens: int | None = None
    reference_steps: int | None = None
    reference_temperature: float | None = 1.0
    reference_normalized: bool = False
    reference_bos: bool = False


_NUMBERS = ("last_number", "stated_number")
_TEST_FIRST = ("test", "validation", "valid", "val", "dev")
_SATMATH = ("satmath", "sat_math", "sat-math")
_GSM8K, _MAWPS = ("openai/gsm8k?name=main", "test"), ("MU-NLPC/Calc-mawps?name=default", "test")
_SATMATH_HUB = ("hails/agieval-sat-math", "test")
_TASKS = (
    Task("hellaswag", "choice", items.hellaswag, hub=("Rowan/hellaswag", "validation"), reference_normalized=True,
         reference_bos=True),
    Task("winogrande", "choice", items.winogrande, hub=("allenai/winogrande?name=winogrande_xl", "validation"),
         reference_normalized=True),
    Task("piqa", "choice", items.piqa, hub=("baber/piqa", "validation"), reference_bos=True),
    Task("siqa", "choice", items.siqa, folders=("siqa", "social_i_qa", "socialiqa"),
         hub=("lighteval/siqa", "validation")),
    Task("lambada", "generate", items.lambada, ("first_word",), ("stripped_match",), lengths=(1, 8), splits=("test",),
         hub=("EleutherAI/lambada_openai?name=default", "test")),
    Task("triviaqa", "generate", items.triviaqa, ("exact_match", "f1", "contains"), ("contains", "f1"), lengths=(1, 16),
         folders=("triviaqa", "trivia_qa"), hub=("mandarjoshi/trivia_qa?name=rc.nocontext", "validation")),
    Task("squad", "generate", items.squad, ("exact_match", "f1", "contains"), ("contains", "f1"), lengths=(1, 24),
         flatten=items.squad_questions, hub=("rajpurkar/squad", "validation"), reference_limit=2000),
    Task("gsm8k", "generate", items.gsm8k, ("strict_match", "last_number"), ("reference_match",), lengths=(1, 256),
         truncate="answer", splits=("test",), hub=_GSM8K, reference_steps=64, reference_temperature=0.0),
    Task("gsm8k_cot", "generate", items.gsm8k_cot, _NUMBERS, lengths=(1, 256), truncate="answer", folders=("gsm8k",),
         splits=("test",), hub=_GSM8K, in_reference=False),
    Task("gsm8k_icot", "generate", items.gsm8k_symbolic, ("strict_match", "last_number"), ("reference_match",),
         lengths=(1, 128), truncate="answer", splits=("test",), reference_steps=64, reference_temperature=0.0),
    Task("mawps", "generate", items.mawps, _NUMBERS, lengths=(1, 16), splits=_TEST_FIRST, hub=_MAWPS,
         in_reference=False),
    Task("mawps_cot", "generate", items.mawps_cot, _NUMBERS, lengths=(1, 128), truncate="answer", folders=("mawps",),
         splits=_TEST_FIRST, hub=_MAWPS, in_reference=False),
    Task("satmath", "generate", items.satmath, ("chosen_letter",), lengths=(1, 16), folders=_SATMATH,
         splits=_TEST_FIRST, hub=_SATMATH_HUB, in_reference=False),
    Task("satmath_cot", "generate", items.satmath_cot, ("chosen_letter",), lengths=(1, 256), truncate="answer",
         folders=_SATMATH, splits=_TEST_FIRST, hub=_SATMATH_HUB, in_reference=False),
    Task("rocstories", "infill", items.rocstories, ("rouge1", "rouge2", "rougeL"), ("rouge1", "rouge2", "rougeL"),
         lengths=(4, 20), truncate="sentence", folders=("rocstories", "rocstories_cloze"), reference_limit=1000,
         reference_steps=32, reference_temperature=None),
    Task("humaneval_infilling", "infill", items.humaneval_infilling, ("pass_at_1",), ("pass_at_1",), executes=True,
         lengths=(3, 40), splits=("singlelineinfilling",), reference_max_tokens=1000, reference_steps=32,
         reference_temperature=None),
    Task("text", "text", items.text),
    Task("reconstruction", "reconstruct", items.text, folders=("reconstruction", "text"), in_reference=False),
    Task("generation", "open_ended", opening, lengths=(128, 128), temperature=1.0,
         folders=("generation", "text"), in_reference=False),
)
TASKS = {task.name: task for task in _TASKS}


def find_task(name: str) -> Task:
    """Returns the task of a name.

    Raises:
      ConfigError: there is no such task.
    """
    if name not in TASKS:
        raise ConfigError(f"there is no task {name!r}; the tasks are {', '.join(TASKS)}")
    return TASKS[name]


def find_file(task: Task, data_dir: str, splits: Sequence[str] | None = None) -> str:
    """Returns the task's file in a data directory: DIR/TASK.jsonl, or DIR/TASK/ and a name with a word of `splits`.

    Raises:
      DataError: no file matches, or several match equally well.
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
    unsplit = [str(path) for path in files if "train" not in path.stem.lower()]
    if unsplit and splits is task.splits:
        return _only(task, sorted(unsplit))
    places = " or ".join(f"{folder / name}" for name in names)
    what_to_do = f"name it with --data_files {task.name}=FILE" if splits is task.splits else "put one there"
    raise DataError(f"no file of the task {task.name} at {places} ({', '.join(SUFFIXES)}; of {', '.join(splits)}); "
                    f"{what_to_do}")


def hub_spec(task: Task, split: str | None = None) -> str | None:
    """Returns the task's dataset on the hub as `read_rows` takes it; None: the hub has it in no supported format.

    Args:
      split: None: the evaluated split.
    """
    if task.hub is None:
        return None
    name, evaluated = task.hub
    return f"hf:{name}{'&' if '?' in name else '?'}split={split or evaluated}"


def load_items(task: Task, path: str, *, reference: bool = False, limit: int | None = None) -> list[Item]:
    """Returns the first `limit` items of a file; under `reference` at most as many as the reference scripts use.

    Raises:
      DataError: the file cannot be read, a row is malformed (the error names its file and line), or there is no item.
    """
    most = min((n for n in (limit, task.reference_limit if reference else None) if n is not None), default=None)
    found = list(itertools.islice((item for row in read_rows(path) for item in _items(task, row, reference)), most))
    if not found:
        raise DataError(f"{path} has no items for the task {task.name}")
    return found


def few_shot_prefix(shown: Sequence[Item]) -> str:
    """Returns the examples that precede every prompt, separated by blank lines.

    Raises:
      DataError: an example has no solution to show.
    """
    for number, item in enumerate(shown):
        if not item.options and not item.solution:
            raise DataError(f"example {number} has no reasoning to show; write examples by hand, in a --prompt_file")
    return "".join(item.shown.strip() + "\n\n" for item in shown)


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


def _items(task: Task, row: Row, reference: bool) -> Iterator[Item]:
    try:
        for fields in task.flatten(row.fields) if task.flatten else [row.fields]:
            yield task.read(fields, reference)
    except BadRecord as error:
        raise DataError(f"{row.where}: {error}, for the task {task.name}") from error


def _only(task: Task, found: Sequence[str]) -> str:
    if len(found) > 1:
        raise DataError(f"several files may be the task {task.name}: {', '.join(found)}; name one with --data_files "
                        f"{task.name}=FILE")
    return found[0]
