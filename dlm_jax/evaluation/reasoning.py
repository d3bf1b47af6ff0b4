"""Problems that are answered by reasoning: from a row of a task's file to its question, directly or step by step.

The tasks whose names end in `_cot` ask for the reasoning first (Kojima et al., arXiv 2205.11916), and their examples
show it (Wei et al., arXiv 2201.11903).
"""

import re
import string
from typing import Any

from dlm_jax.data.records import BadRecord, get_text
from dlm_jax.evaluation.in_context import answer_after
from dlm_jax.evaluation.items import Fields, Item, texts_of

STEP_BY_STEP = " Let's think step by step."
_CALCULATION = re.compile(r"<<.*?>>")
_LETTERED = re.compile(r"^\(?[A-Z]\)\s*")
_HUB_QUERY = re.compile(r"(?:Q:\s*)?(.*?)\s*Answer Choices:.*", re.DOTALL)


def gsm8k(fields: Fields, release: bool) -> Item:
    """{question, answer}, reasoning with `#### number` at its end."""
    question, solution = get_text(fields, "question"), get_text(fields, "answer")
    prompt = question if release else f"Question: {question}\nAnswer:"
    return _marked(prompt, solution if release else " " + solution)


def gsm8k_cot(fields: Fields, release: bool) -> Item:
    """The same step by step; examples say "The answer is", without the calculator's marks."""
    item = gsm8k(fields, release)
    reasoning = _CALCULATION.sub("", item.solution.rpartition("####")[0]).strip()
    return _step_by_step(item, reasoning, item.answers[0])


def gsm8k_symbolic(fields: Fields, release: bool) -> Item:
    """{text: "question||<<a*b=c>> #### answer"}; the prompt is that of fine-tuning, a line break after the question."""
    del release
    question, bar, solution = get_text(fields, "text").partition("||")
    if not bar:
        raise BadRecord("no || between question and answer")
    return _marked(question.strip() + "\n", solution.strip())


def mawps(fields: Fields, release: bool) -> Item:
    """{question, result} as on the hub (Calc-MAWPS), or {sQuestion, lSolutions} as MAWPS and MultiArith came out."""
    del release
    if "sQuestion" in fields:
        question, values = get_text(fields, "sQuestion"), fields.get("lSolutions")
        answer = _number(values[0] if isinstance(values, list) and len(values) == 1 else values, "lSolutions")
    else:
        question = get_text(fields, "question")
        key = "result_float" if fields.get("result_float") is not None else "result"
        answer = _number(fields.get(key), key)
    return Item(prompt=f"Question: {question.strip()}\nAnswer:", answers=(answer,), solution=f" {answer}")


def mawps_cot(fields: Fields, release: bool) -> Item:
    """The same step by step; the files have no reasoning in words, so that none can be shown as an example."""
    item = mawps(fields, release)
    return _step_by_step(item, "", item.answers[0])


def satmath(fields: Fields, release: bool) -> Item:
    """{question, options, label: "B"} as AGIEval came out (arXiv 2304.06364), or {query, choices, gold} as on the hub.

    A passage, where there is one, stands before the question.
    """
    del release
    if "query" in fields:
        found = _HUB_QUERY.fullmatch(get_text(fields, "query"))
        if found is None:
            raise BadRecord("no 'Answer Choices:' in the query")
        question, options, gold = found[1], texts_of(fields, "choices"), fields.get("gold")
        gold = gold[0] if isinstance(gold, list) and len(gold) == 1 else gold
    else:
        passage = fields.get("passage") or ""
        question = "\n".join(filter(None, (str(passage).strip(), get_text(fields, "question").strip())))
        options, gold = texts_of(fields, "options"), fields.get("label")
    letters = string.ascii_uppercase[: len(options)]
    if isinstance(gold, str):
        gold = letters.find(gold.strip()) if len(gold.strip()) == 1 else None
    if not isinstance(gold, int) or not 0 <= gold < len(letters):
        raise BadRecord(f"{fields.get('gold' if 'query' in fields else 'label')!r} where the right one of "
                        f"{len(options)} options was expected")
    lines = [f"{letter}) {_LETTERED.sub('', option.strip())}" for letter, option in zip(letters, options, strict=True)]
    prompt = "\n".join([f"Question: {question}", *lines, "Answer:"])
    return Item(prompt=prompt, answers=(letters[gold],), solution=f" {letters[gold]}")


def satmath_cot(fields: Fields, release: bool) -> Item:
    """The same step by step; AGIEval's own solutions are what examples show."""
    item = satmath(fields, release)
    other = fields.get("other")
    reasoning = other.get("solution") if isinstance(other, dict) else None
    return _step_by_step(item, reasoning if isinstance(reasoning, str) else "", item.answers[0])


def _marked(prompt: str, solution: str) -> Item:
    answer = answer_after(solution)
    if answer is None:
        raise BadRecord("no answer after ####")
    return Item(prompt=prompt, answers=(answer,), solution=solution)


def _step_by_step(item: Item, reasoning: str, answer: str) -> Item:
    shown = f" {' '.join(reasoning.split())} The answer is {answer}." if reasoning.strip() else ""
    return Item(prompt=item.prompt + STEP_BY_STEP, answers=item.answers, solution=shown)


def _number(value: Any, key: str) -> str:
    """A number of a file as text: 39.0 and "39" are both 39."""
    try:
        return f"{float(str(value).replace(',', '')):.12g}"
    except ValueError:
        raise BadRecord(f"{value!r} under {key!r} where a number was expected") from None
