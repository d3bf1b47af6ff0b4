"""Runs tasks on models: one record per item, in a fixed order, so that a stopped run can be resumed."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from tqdm import tqdm

from dlm_jax.errors import ConfigError, DataError
from dlm_jax.evaluation.code_execution import Outcome, Program, completed, truncate_code
from dlm_jax.evaluation.eval_model import EvalModel, GenerationRequest, Pair, fit_context, make_pair
from dlm_jax.evaluation.items import Item, truncate
from dlm_jax.evaluation.metrics import ANSWERS, METRICS, majority
from dlm_jax.evaluation.scoring import reconstruct
from dlm_jax.evaluation.tasks import Task

Record = dict[str, Any]
Execute = Callable[[Sequence[Program]], Sequence[Outcome]]
_REQUIRED_CAPABILITY = {"choice": "score", "text": "score", "reconstruct": "masked_accuracy", "generate": "generate",
                        "infill": "generate", "open_ended": "generate"}  # by the kind of task, a field of EvalModel
_REFERENCE_LENGTH = 256  # tokens per row in the reference scripts' GSM8K; no solution of another task is longer


class Job(NamedTuple):
    """A task, its items, and the examples that precede each prompt."""

    task: Task
    items: Sequence[Item]
    prefix: str = ""


class Setting(NamedTuple):
    """The settings of a run, for all its tasks.

    Attributes:
      reference: whether to follow the protocol `reference`.
      num_steps: forward passes per generated text under `default`; None: the model's default.
      samples: generated texts per item.
      temperature: sampling temperature under `default`; 0 takes the most likely tokens, None is the task's own.
      execute: runs generated programs (`code_execution.Sandbox`); None: tasks that need it are refused.
      judge: scores open-ended texts; None: tasks that need it are refused.
      seed: seed of the masks for reconstruction.
    """

    reference: bool = False
    num_steps: int | None = None
    samples: int = 1
    temperature: float | None = None
    execute: Execute | None = None
    judge: EvalModel | None = None
    seed: int = 0


def run(jobs: Sequence[Job], eval_models: Sequence[EvalModel], *, done: Sequence[Record] = (),
        add: Callable[[list[Record]], None] = lambda records: None, chunk_size: int = 32,
        **settings: Any) -> list[Record]:
    """Returns the records of all items, job by job and model by model.

    Args:
      settings: the fields of `Setting`.
      done: the first records, from a stopped run.
      add: called with the new records of each chunk.
      chunk_size: items per chunk; the progress bar moves after each.

    Raises:
      ConfigError: a model lacks what a task needs, or settings contradict each other.
      DataError: a task has no item that the reference scripts use.
    """
    setting = Setting(**settings)
    for job, eval_model in itertools.product(jobs, eval_models):
        check(job.task, setting)
        capability = _REQUIRED_CAPABILITY[job.task.kind]
        if getattr(eval_model, capability) is None:
            raise ConfigError(f"{eval_model.name} has no {capability}, which the task {job.task.name} needs")
        if job.task.executes and setting.execute is None:
            raise ConfigError(f"the task {job.task.name} runs generated programs; give run() an `execute`")
        if job.task.kind == "open_ended" and (setting.judge is None or setting.judge.score is None):
            raise ConfigError(f"the task {job.task.name} needs a model that judges the generated texts; give "
                              "run() a `judge` that scores")
    records, first = list(done), 0
    for job in jobs:
        numbers = _reference_items(job, eval_models) if setting.reference else range(len(job.items))
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
                    bar.set_postfix_str(_progress(records, job.task, eval_model), refresh=False)
                    bar.update(stop - start)
                    start = stop
    return records


def generates(task: Task) -> bool:
    """Returns whether the task generates texts."""
    return _REQUIRED_CAPABILITY[task.kind] == "generate"


def check(task: Task, setting: Setting) -> None:
    """Raises ConfigError if a task does not support the settings; `run` checks `execute` and `judge` itself."""
    temperature = _temperature(task, setting)
    if setting.samples < 1 or not 0 <= temperature < math.inf:
        raise ConfigError(f"samples must be at least 1 and temperature at least 0 and finite, got "
                          f"{setting.samples} and {temperature:g}")
    scores = not generates(task)
    if setting.samples > 1 and temperature == 0 and not scores:
        raise ConfigError(f"{setting.samples} samples at temperature 0 would all be the same; set a temperature above "
                          "0, for instance 0.7")
    if setting.reference and not task.in_reference:
        raise ConfigError(f"the reference scripts do not have the task {task.name}; choose the protocol default")
    if setting.reference and (setting.samples > 1 or setting.temperature):
        raise ConfigError("the protocol reference generates one sample at temperatures of its own; leave samples "
                          "and temperature out, or choose the protocol default")
    if scores and (setting.samples > 1 or setting.temperature):
        raise ConfigError(f"samples and temperature are for tasks that generate; leave them out for {task.name}")


def _temperature(task: Task, setting: Setting) -> float:
    return task.temperature if setting.temperature is None else setting.temperature


def pairs_of(eval_model: EvalModel, task: Task, item: Item, number: int, *, reference: bool = False,
             prefix: str = "") -> list[Pair]:
    """Returns the pairs to score for an item: one per option; for a text one per row, for reconstruction the first row.

    Under `default` context and continuation are tokenized together (`eval_model.make_pair`), under `reference`
    separately. A context that is too long is cut from the left.

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
        where = f"{task.name}, item {number}, option {option}"
        if reference:
            before = special(prefix + context)
            tokens = (special if task.reference_bos else eval_model.encode)(continuation)
            pairs.append(Pair(fit_context(before, tokens, eval_model, where), tuple(tokens), number, option))
        else:
            pairs.append(make_pair(eval_model, prefix + context, continuation, number, option, where))
    return pairs


def request_of(eval_model: EvalModel, task: Task, item: Item, number: int, *, reference: bool = False,
             prefix: str = "", sample: int = 0) -> GenerationRequest:
    """Returns the gap of an item and its possible lengths; under `reference` the length of the solution."""
    lengths = item.lengths or range(task.lengths[0], task.lengths[1] + 1)
    if reference:
        if eval_model.autoregressive and task.kind == "infill":
            count = len(item.solution)  # characters, as in the reference script
        elif task.name.startswith("gsm8k"):
            count = _REFERENCE_LENGTH - len((eval_model.encode_special or eval_model.encode)(item.prompt))
        else:
            count = max(len(eval_model.encode(answer)) for answer in (item.solution, *item.answers))
        lengths = range(max(count, 1), max(count, 1) + 1)
    else:
        if eval_model.max_length is not None:  # half of the row remains for the text around it
            most = eval_model.max_length // 2
            lengths = range(min(lengths.start, most), min(lengths[-1], most) + 1, lengths.step)
        if task.kind in ("generate", "open_ended") or eval_model.autoregressive:
            lengths = range(lengths[-1], lengths[-1] + 1)
    prompt = item.parent_prompt if eval_model.autoregressive and item.parent_prompt else item.prompt
    suffix = "" if eval_model.autoregressive else item.suffix
    return GenerationRequest(prefix + prompt, suffix, lengths, number, sample)


def judge_options(task: Task, eval_model: EvalModel, item: Item, pairs: Sequence[Pair], scores: Sequence[float],
                  reference: bool) -> dict[str, Any]:
    """Returns the values of a choice: accuracy by score, and by score per byte; under `reference` its own rule only."""
    lengths = [len(pair.continuation) for pair in pairs]
    if not reference:
        sizes = [len(continuation.encode()) for _, continuation in item.options]
        picks = {"accuracy": _least(scores),
                 "accuracy_normalized": _least([score / size for score, size in zip(scores, sizes, strict=True)])}
    elif eval_model.autoregressive and task.reference_normalized:
        picks = {"accuracy": _least([score / length for score, length in zip(scores, lengths, strict=True)])}
    else:
        picks = {"accuracy": _least(scores)}
    return {"scores": list(scores), "tokens": lengths, "gold": item.gold, "picks": list(picks.values()),
            "values": {name: float(pick == item.gold) for name, pick in picks.items()}}


def judge_text(item: Item, pairs: Sequence[Pair], scores: Sequence[float]) -> dict[str, Any]:
    """Returns the values of a text: its nats, tokens and bytes."""
    return {"values": {"nats": math.fsum(scores), "tokens": sum(len(pair.continuation) for pair in pairs),
                       "bytes": len(item.options[0][1].encode())}}


def judge_open_ended(texts: Sequence[str], judged: Sequence[tuple[float, int]]) -> dict[str, Any]:
    """Returns the values of an item's texts; `judged` has the judge's (nats, tokens) of each non-empty text."""
    about = {"text": texts[0]} if len(texts) == 1 else {"texts": list(texts)}
    return {**about, "values": {"judged_nats": math.fsum(nats for nats, _ in judged),
                                "judged_tokens": sum(tokens for _, tokens in judged),
                                "words": sum(len(text.split()) for text in texts) / len(texts)}}


def judge_generation(task: Task, item: Item, texts: Sequence[str], predictions: Sequence[str], reference: bool,
                  outcomes: Sequence[Outcome] = ()) -> dict[str, Any]:
    """Returns the mean of each metric over an item's samples, and for several samples `hit` and `majority`.

    `hit` is whether any sample is right. `majority` is whether the most frequent answer is right; of equally frequent
    ones the first counts (self-consistency, arXiv 2203.11171). Both use the task's first metric, if it has answers.

    Args:
      texts, predictions: the generated text of each sample, and the answer extracted from it.
      outcomes: the outcome of each program, for a task that executes.
    """
    names = task.reference_metrics if reference else task.metrics
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


def extract_answer(task: Task, eval_model: EvalModel, item: Item, text: str, reference: bool) -> str:
    """Returns the judged answer within a generated text; under `reference` all of the text."""
    if reference or (task.executes and not eval_model.autoregressive):
        return text
    if task.executes:
        return truncate_code(item, text)
    if task.kind == "infill":
        return truncate(text, "sentence" if eval_model.autoregressive else "all")
    return truncate(text, task.truncate)


def _reference_items(job: Job, eval_models: Sequence[EvalModel]) -> list[int]:
    """Returns the numbers of the items that the reference scripts use, the same for all models."""
    most = job.task.reference_max_tokens
    if most is None:
        return list(range(len(job.items)))
    numbers = [number for number, item in enumerate(job.items) if all(
        sum(len(eval_model.encode(text)) for text in (item.prompt, item.solution, item.suffix)) <= most
        for eval_model in eval_models)]
    if not numbers:
        raise DataError(f"all items of {job.task.name} have more than {most} tokens, which the reference scripts "
                        "skip; use more items, or choose the protocol default")
    return numbers


def _records(job: Job, eval_model: EvalModel, numbers: Sequence[int], setting: Setting) -> list[Record]:
    task, items, reference = job.task, [job.items[number] for number in numbers], setting.reference
    heads = [{"task": task.name, "model": eval_model.name, "item": number} for number in numbers]
    if task.kind in ("choice", "text"):
        pairs = [pairs_of(eval_model, task, item, number, reference=reference, prefix=job.prefix)
                 for item, number in zip(items, numbers, strict=True)]
        scores = iter(eval_model.score(list(itertools.chain.from_iterable(pairs))))
        found = [[float(next(scores)) for _ in options] for options in pairs]
        return [{**head, **(judge_text(item, options, values) if task.kind == "text"
                            else judge_options(task, eval_model, item, options, values, reference))}
                for head, item, options, values in zip(heads, items, pairs, found, strict=True)]
    if task.kind == "reconstruct":
        pairs = [pairs_of(eval_model, task, item, number)[0] for item, number in zip(items, numbers, strict=True)]
        found = reconstruct(eval_model.masked_accuracy, pairs, setting.seed)
        return [{**head, "values": values} for head, values in zip(heads, found, strict=True)]
    texts = _generate(job, eval_model, numbers, setting)
    if task.kind == "open_ended":
        return [{**head, **values} for head, values in zip(heads, _judged(job, numbers, texts, setting), strict=True)]
    answers = [[extract_answer(task, eval_model, item, text, reference) for text in samples]
               for item, samples in zip(items, texts, strict=True)]
    outcomes = iter(setting.execute([completed(item, answer) for item, samples in zip(items, answers, strict=True)
                                     for answer in samples]) if task.executes else ())
    return [{**head, **judge_generation(task, item, samples, predictions, reference,
                                        list(itertools.islice(outcomes, len(samples))))}
            for head, item, samples, predictions in zip(heads, items, texts, answers, strict=True)]


def _generate(job: Job, eval_model: EvalModel, numbers: Sequence[int], setting: Setting) -> list[list[str]]:
    """Returns the generated texts of each item."""
    task = job.task
    requests = [request_of(eval_model, task, job.items[number], number, reference=setting.reference, prefix=job.prefix,
                           sample=sample) for number in numbers for sample in range(setting.samples)]
    steps, temperature = setting.num_steps, _temperature(task, setting)
    if setting.reference:
        temperature = task.reference_temperature
        if temperature is None:
            temperature = eval_model.reference_temperature
        temperature = 0.0 if eval_model.autoregressive else temperature
        steps = task.reference_steps or _REFERENCE_LENGTH  # more steps than tokens: one token per step
    texts = eval_model.generate(requests, temperature=temperature, num_steps=steps)
    return [list(texts[at : at + setting.samples]) for at in range(0, len(requests), setting.samples)]


def _judged(job: Job, numbers: Sequence[int], texts: Sequence[Sequence[str]], setting: Setting) -> list[Record]:
    """Returns the values of each item's open-ended texts, with one call of the judge; empty texts have no score."""
    prompts = [job.prefix + job.items[number].prompt for number in numbers]
    pairs = [[pairs_of(setting.judge, job.task, Item(options=((prompt, text),)), number)[0] if text else None
              for text in samples] for number, prompt, samples in zip(numbers, prompts, texts, strict=True)]
    scores = iter(setting.judge.score([pair for row in pairs for pair in row if pair]))
    return [judge_open_ended(samples, [(float(next(scores)), len(pair.continuation)) for pair in row if pair])
            for samples, row in zip(texts, pairs, strict=True)]


def generated_texts(record: Record) -> list[str]:
    """Returns the texts in the record of a task that generates."""
    return record["texts"] if "texts" in record else [record["text"]]


def _progress(records: Sequence[Record], task: Task, eval_model: EvalModel) -> str:
    values = [record["values"] for record in records
              if record["task"] == task.name and record["model"] == eval_model.name]
    if task.kind == "text":
        return f"{math.fsum(v['nats'] for v in values) / sum(v['tokens'] for v in values):.3f} nats/token"
    if task.kind == "open_ended":
        nats, tokens = (math.fsum(v[key] for v in values) for key in ("judged_nats", "judged_tokens"))
        return f"perplexity {math.exp(nats / max(tokens, 1)):.2f}"
    name = next(iter(values[0]))
    return f"{name} {math.fsum(v[name] for v in values) / len(values):.3f}"


def _least(scores: Sequence[float]) -> int:
    return min(range(len(scores)), key=scores.__getitem__)
