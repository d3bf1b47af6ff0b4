"""Tasks run on candidates: one record an item, in an order that never changes, so that a stopped run goes on."""

import itertools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from tqdm import tqdm

from dlm_jax.errors import ConfigError, DataError
from dlm_jax.evaluation.candidate import Blank, Candidate, Pair
from dlm_jax.evaluation.items import Item
from dlm_jax.evaluation.metrics import METRICS
from dlm_jax.evaluation.tasks import Task

Record = dict[str, Any]
_CANVAS = 256  # tokens of a row in the release's GSM8K; more than any reference elsewhere has
_SENTENCE = re.compile(r".*?[.!?][\"'”’]*(?=\s|$)", re.DOTALL)


class Job(NamedTuple):
    """A task's items, and the examples that stand before each prompt."""

    task: Task
    items: Sequence[Item]
    prefix: str = ""


def run(jobs: Sequence[Job], candidates: Sequence[Candidate], *, release: bool = False, num_steps: int | None = None,
        done: Sequence[Record] = (), add: Callable[[list[Record]], None] = lambda records: None,
        chunk_size: int = 32) -> list[Record]:
    """The records of all items, job by job and candidate by candidate.

    Args:
      num_steps: of writing, under the protocol `default`; None leaves it to the model.
      done: the first records, of a run that was stopped.
      add: called with new records as they come.
      chunk_size: items at a time, between which the progress bar moves and records are added.

    Raises:
      ConfigError: a candidate cannot do what a task asks.
    """
    for job, candidate in itertools.product(jobs, candidates):
        able = candidate.score if job.task.kind in ("choice", "text") else candidate.write
        if able is None:
            raise ConfigError(f"{candidate.name} cannot {'write' if candidate.write is None else 'score'}, which the "
                              f"task {job.task.name} asks for")
    records, first = list(done), 0
    for job, candidate in itertools.product(jobs, candidates):
        start = min(max(len(done) - first, 0), len(job.items))
        first += len(job.items)
        with tqdm(total=len(job.items), initial=start, desc=f"{job.task.name}, {candidate.name}", unit="item",
                  disable=None) as bar:
            while start < len(job.items):
                stop = min(start // chunk_size * chunk_size + chunk_size, len(job.items))
                found = _records(job, candidate, range(start, stop), release, num_steps)
                add(found)
                records += found
                bar.set_postfix_str(_running(records, job.task, candidate), refresh=False)
                bar.update(stop - start)
                start = stop
    return records


def pairs_of(candidate: Candidate, task: Task, item: Item, number: int, *, release: bool = False,
             prefix: str = "") -> list[Pair]:
    """What is scored of an item, an option a pair; of a text as many as the model needs to take it.

    Under `default` context and continuation are tokenised together, as they would stand in a text, and parted where
    the context's own tokens end; tokens that straddle are scored. Under `release` they are tokenised apart. A context
    that is too long loses its beginning.

    Raises:
      DataError: a continuation has no token, or more than the model takes.
    """
    if task.kind == "text":
        tokens = candidate.encode(item.options[0][1])
        size = max(len(tokens), 1) if candidate.max_length is None else candidate.max_length - 1
        return [Pair((), tuple(tokens[at : at + size]), number, place)
                for place, at in enumerate(range(0, max(len(tokens), 1), size))]
    special = candidate.encode_special or candidate.encode
    options = item.parent_options if candidate.autoregressive and item.parent_options else item.options
    pairs = []
    for option, (context, continuation) in enumerate(options):
        if release:
            before = special(prefix + context)
            tokens = (special if task.release_bos else candidate.encode)(continuation)
        else:
            before, whole = candidate.encode(prefix + context), candidate.encode(prefix + context + continuation)
            same = sum(1 for _ in itertools.takewhile(lambda two: two[0] == two[1], zip(before, whole, strict=False)))
            before, tokens = whole[:same], whole[same:]
        pairs.append(Pair(_fitting(before, tokens, candidate, f"{task.name}, item {number}, option {option}"),
                          tuple(tokens), number, option))
    return pairs


def blank_of(candidate: Candidate, task: Task, item: Item, number: int, *, release: bool = False,
             prefix: str = "") -> Blank:
    """Where an item asks to write, and how much: under `release` as much as the reference has."""
    fewest, most = task.lengths
    if release and candidate.autoregressive and task.kind == "infill":
        fewest = most = len(item.solution)  # characters, as the released script has it
    elif release and task.name.startswith("gsm8k"):
        fewest = most = max(_CANVAS - len((candidate.encode_special or candidate.encode)(item.prompt)), 1)
    elif release:
        fewest = most = max(len(candidate.encode(answer)) for answer in (item.solution, *item.answers))
    elif task.kind == "write" or candidate.autoregressive:
        fewest = most
    if candidate.max_length is not None and not release:  # half of the row is left to the prompt
        most = min(most, candidate.max_length // 2)
    suffix = "" if candidate.autoregressive else item.suffix
    return Blank(prefix + item.prompt, suffix, range(min(fewest, most), most + 1), number)


def _fitting(context: Sequence[int], continuation: Sequence[int], candidate: Candidate, where: str) -> tuple[int, ...]:
    if not continuation:
        raise DataError(f"{where} has no token to score")
    if candidate.max_length is None:
        return tuple(context)
    room = candidate.max_length - 1 - len(continuation)
    if room < 1:
        raise DataError(f"{where} has {len(continuation)} tokens to score, and {candidate.name} takes at most "
                        f"{candidate.max_length} with a context")
    return tuple(context[-room:])


def _records(job: Job, candidate: Candidate, numbers: range, release: bool, num_steps: int | None) -> list[Record]:
    task, items = job.task, [job.items[number] for number in numbers]
    heads = [{"task": task.name, "model": candidate.name, "item": number} for number in numbers]
    if task.kind in ("choice", "text"):
        asked = [pairs_of(candidate, task, item, number, release=release, prefix=job.prefix)
                 for item, number in zip(items, numbers, strict=True)]
        scores = iter(candidate.score([pair for pairs in asked for pair in pairs]))
        judge = _judge_text if task.kind == "text" else _judge_options
        return [{**head, **judge(task, candidate, item, pairs, [float(next(scores)) for _ in pairs], release)}
                for head, item, pairs in zip(heads, items, asked, strict=True)]
    blanks = [blank_of(candidate, task, item, number, release=release, prefix=job.prefix)
              for item, number in zip(items, numbers, strict=True)]
    temperature, steps = (0.0, num_steps) if not release else (
        candidate.release_temperature if task.release_temperature is None else task.release_temperature,
        task.release_steps or _CANVAS)  # more steps than tokens: one token a step
    texts = candidate.write(blanks, temperature=0.0 if candidate.autoregressive else temperature, num_steps=steps)
    return [{**head, **_judge_writing(task, candidate, item, text, release)}
            for head, item, text in zip(heads, items, texts, strict=True)]


def _judge_options(task: Task, candidate: Candidate, item: Item, pairs: Sequence[Pair], scores: Sequence[float],
                   release: bool) -> Record:
    """The likeliest option, and the likeliest per byte; under `release` by its own rule alone."""
    lengths = [len(pair.continuation) for pair in pairs]
    if not release:
        sizes = [len(continuation.encode()) for _, continuation in item.options]
        picks = {"accuracy": _least(scores),
                 "accuracy_normalised": _least([score / size for score, size in zip(scores, sizes, strict=True)])}
    elif candidate.autoregressive and task.release_normalised:
        picks = {"accuracy": _least([score / length for score, length in zip(scores, lengths, strict=True)])}
    else:
        picks = {"accuracy": _least(scores)}
    return {"scores": list(scores), "tokens": lengths, "gold": item.gold, "picks": list(picks.values()),
            "values": {name: float(pick == item.gold) for name, pick in picks.items()}}


def _judge_text(task: Task, candidate: Candidate, item: Item, pairs: Sequence[Pair], scores: Sequence[float],
                release: bool) -> Record:
    del task, candidate, release
    return {"values": {"nats": math.fsum(scores), "tokens": sum(len(pair.continuation) for pair in pairs),
                       "bytes": len(item.options[0][1].encode())}}


def _judge_writing(task: Task, candidate: Candidate, item: Item, text: str, release: bool) -> Record:
    prediction = text if release else cut(text, "sentence" if candidate.autoregressive and task.kind == "infill"
                                          else "all" if task.kind == "infill" else task.cut)
    names = task.release_metrics if release else task.metrics
    return {"text": text, "prediction": prediction, "answers": list(item.answers),
            "values": {name: METRICS[name](prediction, item.answers) for name in names}}


def cut(text: str, how: str) -> str:
    """The first "line" of a text, its first "sentence", or "all" of it."""
    text = text.strip()
    if how == "line":
        return text.partition("\n")[0].strip()
    sentence = _SENTENCE.match(text) if how == "sentence" else None
    return sentence[0] if sentence else text


def _least(scores: Sequence[float]) -> int:
    return min(range(len(scores)), key=scores.__getitem__)


def _running(records: Sequence[Record], task: Task, candidate: Candidate) -> str:
    values = [record["values"] for record in records
              if record["task"] == task.name and record["model"] == candidate.name]
    if task.kind == "text":
        return f"{math.fsum(v['nats'] for v in values) / sum(v['tokens'] for v in values):.3f} nats/token"
    name = next(iter(values[0]))
    return f"{name} {math.fsum(v[name] for v in values) / len(values):.3f}"
