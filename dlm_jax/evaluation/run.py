"""What a model's scores and texts are worth: the values of one item's record."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from tqdm import tqdm

from dlm_jax.errors import ConfigError, DataError
from dlm_jax.evaluation.code_execution import Outcome, Program, completed, cut_code
from dlm_jax.evaluation.eval_model import EvalModel, GenerationRequest, Pair
from dlm_jax.evaluation.items import Item, cut
from dlm_jax.evaluation.metrics import ANSWERS, METRICS, majority
from dlm_jax.evaluation.scoring import reconstructed
from dlm_jax.evaluation.tasks import Task


def judge_options(task: Task, eval_model: EvalModel, item: Item, pairs: Sequence[Pair], scores: Sequence[float],
                  release: bool) -> dict[str, Any]:
    """The likeliest option, and the likeliest per byte; under `release` by its own rule alone."""
    lengths = [len(pair.continuation) for pair in pairs]
    if not release:
        sizes = [len(continuation.encode()) for _, continuation in item.options]
        picks = {"accuracy": _least(scores),
                 "accuracy_normalised": _least([score / size for score, size in zip(scores, sizes, strict=True)])}
    elif eval_model.autoregressive and task.release_normalised:
        picks = {"accuracy": _least([score / length for score, length in zip(scores, lengths, strict=True)])}
    else:
        picks = {"accuracy": _least(scores)}
    return {"scores": list(scores), "tokens": lengths, "gold": item.gold, "picks": list(picks.values()),
            "values": {name: float(pick == item.gold) for name, pick in picks.items()}}


def judge_text(item: Item, pairs: Sequence[Pair], scores: Sequence[float]) -> dict[str, Any]:
    """How many nats, for how many tokens and bytes."""
    return {"values": {"nats": math.fsum(scores), "tokens": sum(len(pair.continuation) for pair in pairs),
                       "bytes": len(item.options[0][1].encode())}}


def judge_free(texts: Sequence[str], judged: Sequence[tuple[float, int]]) -> dict[str, Any]:
    """What an item's samples are to the judge, (nats, tokens) of each that is not empty, and their words."""
    about = {"text": texts[0]} if len(texts) == 1 else {"texts": list(texts)}
    return {**about, "values": {"judged_nats": math.fsum(nats for nats, _ in judged),
                                "judged_tokens": sum(tokens for _, tokens in judged),
                                "words": sum(len(text.split()) for text in texts) / len(texts)}}


def judge_writing(task: Task, item: Item, texts: Sequence[str], predictions: Sequence[str], release: bool,
                  outcomes: Sequence[Outcome] = ()) -> dict[str, Any]:
    """The mean of each metric over an item's samples; of several also what they reach together.

    `hit` is whether any sample is right, and `majority` whether the answer is that most of them agree on, of equals
    the one seen first (self-consistency, arXiv 2203.11171), both by the task's first metric and where that tells right
    from wrong.

    Args:
      texts, predictions: what was written, sample by sample, and what of it is judged.
      outcomes: of a task that executes, how the programs went.
    """
    names = task.release_metrics if release else task.metrics
    values = {name: [METRICS[name](prediction, item.answers) for prediction in predictions]
              for name in names if not task.executes}
    if task.executes:
        values["pass_at_1"] = [float(outcome.passed) for outcome in outcomes]
    means = {name: math.fsum(found) / len(found) for name, found in values.items()}
    about = {"answers": list(item.answers)} if item.answers else {}
    about |= {"outcomes": [outcome.reason for outcome in outcomes]} if task.executes else {}
    if len(texts) == 1:
        return {"text": texts[0], "prediction": predictions[0], **about, "values": means}
    first, answer_of = values[names[0]], ANSWERS.get(names[0])
    if answer_of:
        answers = [answer_of(prediction) for prediction in predictions]
        agreed = majority(answers)
        means["majority"] = 0.0 if agreed is None else first[answers.index(agreed)]
        about["votes"] = answers
    if answer_of or task.executes:
        means["hit"] = max(first)
    return {"texts": list(texts), "predictions": list(predictions), **about, "values": means}


def extract_answer(task: Task, eval_model: EvalModel, item: Item, text: str, release: bool) -> str:
    """What of a text counts: under `release` all of it."""
    if release or (task.executes and not eval_model.autoregressive):
        return text
    if task.executes:
        return cut_code(item, text)
    if task.kind == "infill":
        return cut(text, "sentence" if eval_model.autoregressive else "all")
    return cut(text, task.cut)


def _least(scores: Sequence[float]) -> int:
    return min(range(len(scores)), key=scores.__getitem__)


# ---- Tasks run on candidates: one record an item, in an order that never changes, so that a stopped run goes on.


Record = dict[str, Any]
Execute = Callable[[Sequence[Program]], Sequence[Outcome]]
_REQUIRED_CAPABILITY = {"choice": "score", "text": "score", "reconstruct": "guess", "write": "write", "infill": "write",
         "free": "write"}  # what of a candidate each kind of task asks
_CANVAS = 256  # tokens of a row in the release's GSM8K; more than any reference elsewhere has


class Job(NamedTuple):
    """A task's items, and the examples that stand before each prompt."""

    task: Task
    items: Sequence[Item]
    prefix: str = ""


class Setting(NamedTuple):
    """How all tasks are run.

    Attributes:
      release: under the protocol `release`.
      num_steps: of writing, under the protocol `default`; None leaves it to the model.
      samples: how many texts are written for each item.
      temperature: at which they are written, under the protocol `default`; 0 takes the likeliest tokens, None is the
        task's own.
      execute: runs programs that were written (`sandbox.Sandbox`); None: tasks that need it are refused.
      judge: scores what is written freely; None: tasks that need it are refused.
      seed: of what is masked for reconstruction.
    """

    release: bool = False
    num_steps: int | None = None
    samples: int = 1
    temperature: float | None = None
    execute: Execute | None = None
    judge: EvalModel | None = None
    seed: int = 0


def run(jobs: Sequence[Job], eval_models: Sequence[EvalModel], *, done: Sequence[Record] = (),
        add: Callable[[list[Record]], None] = lambda records: None, chunk_size: int = 32,
        **settings: Any) -> list[Record]:
    """The records of all items, job by job and candidate by candidate.

    Args:
      settings: those of `Setting`.
      done: the first records, of a run that was stopped.
      add: called with new records as they come.
      chunk_size: items at a time, between which the progress bar moves and records are added.

    Raises:
      ConfigError: a candidate cannot do what a task asks, or the settings do not go together.
      DataError: the released scripts take no item of a task.
    """
    setting = Setting(**settings)
    for job, eval_model in itertools.product(jobs, eval_models):
        check(job.task, setting)
        if getattr(eval_model, _REQUIRED_CAPABILITY[job.task.kind]) is None:
            raise ConfigError(f"{eval_model.name} cannot {_REQUIRED_CAPABILITY[job.task.kind]}, which the task {job.task.name} asks "
                              "for")
        if job.task.executes and setting.execute is None:
            raise ConfigError(f"the task {job.task.name} runs programs that a model wrote; give run() an `execute`")
        if job.task.kind == "free" and (setting.judge is None or setting.judge.score is None):
            raise ConfigError(f"the task {job.task.name} needs a model that judges what is written; give run() a "
                              "`judge` that scores")
    records, first = list(done), 0
    for job in jobs:
        numbers = _taken(job, eval_models) if setting.release else range(len(job.items))
        for eval_model in eval_models:
            start = min(max(len(done) - first, 0), len(numbers))
            first += len(numbers)
            with tqdm(total=len(numbers), initial=start, desc=f"{job.task.name}, {eval_model.name}", unit="item",
                      disable=None) as bar:
                while start < len(numbers):
                    stop = min(start // chunk_size * chunk_size + chunk_size, len(numbers))
                    found = _records(job, eval_model, numbers[start:stop], setting)
                    add(found)
                    records += found
                    bar.set_postfix_str(_running(records, job.task, eval_model), refresh=False)
                    bar.update(stop - start)
                    start = stop
    return records


def writes(task: Task) -> bool:
    """Whether texts are written for it."""
    return _REQUIRED_CAPABILITY[task.kind] == "write"


def check(task: Task, setting: Setting) -> None:
    """Raises ConfigError if a task cannot be run so; whether programs may be run is asked elsewhere."""
    temperature = _temperature(task, setting)
    if setting.samples < 1 or not 0 <= temperature < math.inf:
        raise ConfigError(f"there must be a sample and a temperature of 0 or more, got {setting.samples} and "
                          f"{temperature:g}")
    scores = not writes(task)
    if setting.samples > 1 and temperature == 0 and not scores:
        raise ConfigError(f"{setting.samples} samples at temperature 0 would all be the same; set a temperature above "
                          "0, for instance 0.7")
    if setting.release and not task.released:
        raise ConfigError(f"the released scripts have no task {task.name}; choose the protocol default")
    if setting.release and (setting.samples > 1 or setting.temperature):
        raise ConfigError("the protocol reference writes one sample at temperatures of its own; leave samples and "
                          "temperature out, or choose the protocol default")
    if scores and (setting.samples > 1 or setting.temperature):
        raise ConfigError(f"samples and a temperature are for tasks that write, and {task.name} scores; leave them out")


def _temperature(task: Task, setting: Setting) -> float:
    return task.temperature if setting.temperature is None else setting.temperature


def pairs_of(eval_model: EvalModel, task: Task, item: Item, number: int, *, release: bool = False,
             prefix: str = "") -> list[Pair]:
    """What is scored of an item, an option a pair; of a text as many as the model needs to take it, and to
    reconstruct it the first of them.

    Under `default` context and continuation are tokenised together, as they would stand in a text, and parted where
    the context's own tokens end; tokens that straddle are scored. Under `release` they are tokenised apart. A context
    that is too long loses its beginning.

    Raises:
      DataError: a continuation has no token, or more than the model takes.
    """
    if task.kind in ("text", "reconstruct"):
        tokens = eval_model.encode(item.options[0][1])
        size = max(len(tokens), 1) if eval_model.max_length is None else eval_model.max_length - 1
        if task.kind == "reconstruct":
            return [Pair((), tuple(tokens[:size]), number)]
        return [Pair((), tuple(tokens[at : at + size]), number, place)
                for place, at in enumerate(range(0, max(len(tokens), 1), size))]
    special = eval_model.encode_special or eval_model.encode
    options = item.parent_options if eval_model.autoregressive and item.parent_options else item.options
    pairs = []
    for option, (context, continuation) in enumerate(options):
        if release:
            before = special(prefix + context)
            tokens = (special if task.release_bos else eval_model.encode)(continuation)
        else:
            before, whole = eval_model.encode(prefix + context), eval_model.encode(prefix + context + continuation)
            same = sum(1 for _ in itertools.takewhile(lambda two: two[0] == two[1], zip(before, whole, strict=False)))
            before, tokens = whole[:same], whole[same:]
        pairs.append(Pair(_fitting(before, tokens, eval_model, f"{task.name}, item {number}, option {option}"),
                          tuple(tokens), number, option))
    return pairs


def blank_of(eval_model: EvalModel, task: Task, item: Item, number: int, *, release: bool = False,
             prefix: str = "", sample: int = 0) -> GenerationRequest:
    """Where an item asks to write, and how much: under `release` as much as the reference has."""
    lengths = item.lengths or range(task.lengths[0], task.lengths[1] + 1)
    if release:
        if eval_model.autoregressive and task.kind == "infill":
            count = len(item.solution)  # characters, as the released script has it
        elif task.name.startswith("gsm8k"):
            count = _CANVAS - len((eval_model.encode_special or eval_model.encode)(item.prompt))
        else:
            count = max(len(eval_model.encode(answer)) for answer in (item.solution, *item.answers))
        lengths = range(max(count, 1), max(count, 1) + 1)
    else:
        if eval_model.max_length is not None:  # half of the row is left to the text around
            most = eval_model.max_length // 2
            lengths = range(min(lengths.start, most), min(lengths[-1], most) + 1, lengths.step)
        if task.kind in ("write", "free") or eval_model.autoregressive:
            lengths = range(lengths[-1], lengths[-1] + 1)
    prompt = item.parent_prompt if eval_model.autoregressive and item.parent_prompt else item.prompt
    suffix = "" if eval_model.autoregressive else item.suffix
    return GenerationRequest(prefix + prompt, suffix, lengths, number, sample)


def _taken(job: Job, eval_models: Sequence[EvalModel]) -> list[int]:
    """The numbers of the items that the released scripts take, the same for all candidates."""
    most = job.task.release_most_tokens
    if most is None:
        return list(range(len(job.items)))
    numbers = [number for number, item in enumerate(job.items) if all(
        sum(len(eval_model.encode(text)) for text in (item.prompt, item.solution, item.suffix)) <= most
        for eval_model in eval_models)]
    if not numbers:
        raise DataError(f"all items of {job.task.name} have more than {most} tokens, and those the released scripts "
                        "leave out; take more items, or choose the protocol default")
    return numbers


def _fitting(context: Sequence[int], continuation: Sequence[int], eval_model: EvalModel, where: str) -> tuple[int, ...]:
    if not continuation:
        raise DataError(f"{where} has no token to score")
    if eval_model.max_length is None:
        return tuple(context)
    room = eval_model.max_length - 1 - len(continuation)
    if room < 1:
        raise DataError(f"{where} has {len(continuation)} tokens to score, and {eval_model.name} takes at most "
                        f"{eval_model.max_length} with a context")
    return tuple(context[-room:])


def _records(job: Job, eval_model: EvalModel, numbers: Sequence[int], setting: Setting) -> list[Record]:
    task, items, release = job.task, [job.items[number] for number in numbers], setting.release
    heads = [{"task": task.name, "model": eval_model.name, "item": number} for number in numbers]
    if task.kind in ("choice", "text"):
        asked = [pairs_of(eval_model, task, item, number, release=release, prefix=job.prefix)
                 for item, number in zip(items, numbers, strict=True)]
        scores = iter(eval_model.score([pair for pairs in asked for pair in pairs]))
        found = [[float(next(scores)) for _ in pairs] for pairs in asked]
        return [{**head, **(judge_text(item, pairs, values) if task.kind == "text"
                            else judge_options(task, eval_model, item, pairs, values, release))}
                for head, item, pairs, values in zip(heads, items, asked, found, strict=True)]
    if task.kind == "reconstruct":
        pairs = [pairs_of(eval_model, task, item, number)[0] for item, number in zip(items, numbers, strict=True)]
        return [{**head, "values": values}
                for head, values in zip(heads, reconstructed(eval_model.guess, pairs, setting.seed), strict=True)]
    texts = _written(job, eval_model, numbers, setting)
    if task.kind == "free":
        return [{**head, **values} for head, values in zip(heads, _judged(job, numbers, texts, setting), strict=True)]
    parts = [[extract_answer(task, eval_model, item, text, release) for text in written]
             for item, written in zip(items, texts, strict=True)]
    outcomes = iter(setting.execute([completed(item, part) for item, written in zip(items, parts, strict=True)
                                     for part in written]) if task.executes else ())
    return [{**head, **judge_writing(task, item, written, judged, release,
                                     list(itertools.islice(outcomes, len(written))))}
            for head, item, written, judged in zip(heads, items, texts, parts, strict=True)]


def _written(job: Job, eval_model: EvalModel, numbers: Sequence[int], setting: Setting) -> list[list[str]]:
    """The samples of each item."""
    task = job.task
    blanks = [blank_of(eval_model, task, job.items[number], number, release=setting.release, prefix=job.prefix,
                       sample=sample) for number in numbers for sample in range(setting.samples)]
    steps, temperature = setting.num_steps, _temperature(task, setting)
    if setting.release:
        temperature = (eval_model.release_temperature if task.release_temperature is None else task.release_temperature)
        temperature = 0.0 if eval_model.autoregressive else temperature
        steps = task.release_steps or _CANVAS  # more steps than tokens: one token a step
    texts = eval_model.write(blanks, temperature=temperature, num_steps=steps)
    return [list(texts[at : at + setting.samples]) for at in range(0, len(blanks), setting.samples)]


def _judged(job: Job, numbers: Sequence[int], texts: Sequence[Sequence[str]], setting: Setting) -> list[Record]:
    """What the judge makes of each item's samples, all in one call; of an empty text nothing."""
    prompts = [job.prefix + job.items[number].prompt for number in numbers]
    asked = [[pairs_of(setting.judge, job.task, Item(options=((prompt, text),)), number)[0] if text else None
              for text in samples] for number, prompt, samples in zip(numbers, prompts, texts, strict=True)]
    scores = iter(setting.judge.score([pair for pairs in asked for pair in pairs if pair is not None]))
    return [judge_free(samples, [(float(next(scores)), len(pair.continuation)) for pair in pairs if pair is not None])
            for samples, pairs in zip(texts, asked, strict=True)]


def written(record: Record) -> list[str]:
    """The texts of a record of a task that writes."""
    return record["texts"] if "texts" in record else [record["text"]]


def _running(records: Sequence[Record], task: Task, eval_model: EvalModel) -> str:
    values = [record["values"] for record in records
              if record["task"] == task.name and record["model"] == eval_model.name]
    if task.kind == "text":
        return f"{math.fsum(v['nats'] for v in values) / sum(v['tokens'] for v in values):.3f} nats/token"
    if task.kind == "free":
        nats, tokens = (math.fsum(v[key] for v in values) for key in ("judged_nats", "judged_tokens"))
        return f"perplexity {math.exp(nats / max(tokens, 1)):.2f}"
    name = next(iter(values[0]))
    return f"{name} {math.fsum(v[name] for v in values) / len(values):.3f}"
