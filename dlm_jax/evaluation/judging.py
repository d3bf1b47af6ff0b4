"""What a model's scores and texts are worth: the values of one item's record."""

import math
from collections.abc import Sequence
from typing import Any

from dlm_jax.evaluation.eval_model import EvalModel, Pair
from dlm_jax.evaluation.in_context import majority
from dlm_jax.evaluation.items import Item
from dlm_jax.evaluation.metrics import ANSWERS, METRICS
from dlm_jax.evaluation.programs import cut_code
from dlm_jax.evaluation.sandbox import Outcome
from dlm_jax.evaluation.tasks import Task
from dlm_jax.evaluation.text_parts import cut


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
