"""Parts of a text."""

import dataclasses
import re
import string
from collections.abc import Iterator, Mapping
from typing import Any

from dlm_jax.data.records import BadRecord, get_text
from dlm_jax.evaluation.metrics import answer_after

_SENTENCE = re.compile(r".*?[.!?][\"'”’]*(?=\s|$)", re.DOTALL)
_NEXT_QUESTION = re.compile(r"\n\s*(?:Question|Q):")


def cut(text: str, how: str) -> str:
    """The first "line" of a text, its first "sentence", what stands before another question, or "all" of it."""
    text = text.strip()
    if how == "line":
        return text.partition("\n")[0].strip()
    if how == "answer":
        return _NEXT_QUESTION.split(text, maxsplit=1)[0].strip()
    sentence = _SENTENCE.match(text) if how == "sentence" else None
    return sentence[0] if sentence else text


# ---- From a row of a task's file to what a model is asked. Each function takes the fields of a row and the protocol.
#
# Under the protocol `release` prompts and options are those of the released scripts, their spaces included; see
# `tasks` for where that differs from what is right.


Fields = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
      options: (context, continuation) of each option, of which the continuation is scored.
      parent_options: the same where the released scripts ask the parent something else.
      gold: the right option.
      prompt, suffix: where something is to be written, after the one and before the other.
      parent_prompt: the prompt where the released scripts ask the parent something else.
      answers: what is accepted.
      solution: what follows the prompt where the item is shown as an example; empty: it cannot be shown.
      tests: where a program is completed, what runs after it.
      one_line: whether the gap is a line.
      lengths: how many tokens the gap may have, where the task's range does not suit it.
    """

    options: tuple[tuple[str, str], ...] = ()
    parent_options: tuple[tuple[str, str], ...] = ()
    gold: int = 0
    prompt: str = ""
    suffix: str = ""
    parent_prompt: str = ""
    answers: tuple[str, ...] = ()
    solution: str = ""
    tests: str = ""
    one_line: bool = False
    lengths: range | None = None

    @property
    def shown(self) -> str:
        """The item with its answer."""
        return "".join(self.options[self.gold]) if self.options else self.prompt + self.solution + self.suffix


def hellaswag(fields: Fields, release: bool) -> Item:
    """{activity_label, ctx_a, ctx_b, endings, label}, or {query, choices, gold} with the clean-up done."""
    if "query" in fields:
        return _choice(fields, get_text(fields, "query"), texts_of(fields, "choices"), "gold", 0, release)
    context = f"{get_text(fields, 'ctx_a')} {get_text(fields, 'ctx_b').capitalize()}"
    prompt = wikihow(f"{get_text(fields, 'activity_label')}: {context}")
    return _choice(fields, prompt, [wikihow(ending) for ending in texts_of(fields, "endings")], "label", 0, release)


def winogrande(fields: Fields, release: bool) -> Item:
    """{sentence with a _, option1, option2, answer}, or {context_options, continuation, gold}.

    The rest of the sentence is scored after each option, so that how frequent a name is has no part in it (Trinh and
    Le, arXiv 1806.02847). The release scores the option and the rest, joined without the space between them.
    """
    if "context_options" in fields and not release:
        rest = " " + get_text(fields, "continuation").strip()
        contexts = texts_of(fields, "context_options")
        return Item(tuple((context, rest) for context in contexts), gold=_index(fields, "gold", len(contexts)))
    before, gap, rest = get_text(fields, "sentence").partition("_")
    if not gap:
        raise BadRecord("no _ in the sentence")
    names = [get_text(fields, "option1"), get_text(fields, "option2")]
    gold = _index(fields, "answer", 2, first=1)
    if release:
        return Item(tuple((before, name + rest.strip()) for name in names),
                    tuple((before, f"{name} {rest.strip()}") for name in names), gold=gold)
    return Item(tuple((before + name, rest) for name in names), gold=gold)


def piqa(fields: Fields, release: bool) -> Item:
    """{goal, sol1, sol2, label}; the release puts two spaces before an option."""
    prompt = f"Question: {get_text(fields, 'goal')}\nAnswer:"
    options = [get_text(fields, "sol1"), get_text(fields, "sol2")]
    if release:
        prompt, options = prompt + " ", [f" {option}" for option in options]
    return _choice(fields, prompt, options, "label", 0, release)


def siqa(fields: Fields, release: bool) -> Item:
    """{context, question, answerA, answerB, answerC, label}."""
    prompt = f"Question: {get_text(fields, 'context')} {get_text(fields, 'question')}\nAnswer:" + " " * release
    return _choice(fields, prompt, [get_text(fields, f"answer{letter}") for letter in "ABC"], "label", 1, release)


def lambada(fields: Fields, release: bool) -> Item:
    """{text}, whose last word is to be found."""
    del release
    before, _, word = get_text(fields, "text").strip().rpartition(" ")
    if not before:
        raise BadRecord("not two words, of which the last would be asked for")
    return Item(prompt=before, answers=(word,), solution=" " + word)


def triviaqa(fields: Fields, release: bool) -> Item:
    """{question, answer: {value, aliases}}, or {context: the prompt, answer, aliases}."""
    answer = fields.get("answer")
    holder = answer if isinstance(answer, dict) else fields
    value = get_text(holder, "value" if isinstance(answer, dict) else "answer")
    answers = tuple(dict.fromkeys([value, *(texts_of(holder, "aliases") if "aliases" in holder else [])]))
    prompt = (get_text(fields, "context") if "question" not in fields
              else f"Question: {get_text(fields, 'question').rstrip('?')}?\nAnswer:")
    return _answered(prompt, answers, release)


def squad(fields: Fields, release: bool) -> Item:
    """{context, question, answers: {text}} or answers as a list of {text}; the release writes "Quesion"."""
    answers = fields.get("answers")
    texts = texts_of(answers, "text") if isinstance(answers, dict) else [get_text(a, "text") for a in answers or []]
    if not texts:
        raise BadRecord("no answer under 'answers'")
    context, question = get_text(fields, "context"), get_text(fields, "question")
    prompt = (f"{context}\nQuesion{question}?\nAnswer:" if release else f"{context}\nQuestion: {question}\nAnswer:")
    return _answered(prompt, tuple(dict.fromkeys(texts)), release)


def rocstories(fields: Fields, release: bool) -> Item:
    """The cloze test's columns: the third sentence is missing, the fifth is the right ending."""
    del release
    one, two, three, four = (get_text(fields, f"InputSentence{n}").strip() for n in range(1, 5))
    endings = [get_text(fields, f"RandomFifthSentenceQuiz{n}").strip() for n in (1, 2)]
    five = endings[_index(fields, "AnswerRightEnding", 2, first=1)]
    return Item(prompt=f"{one} {two} ", suffix=f" {four} {five}", answers=(three,), solution=three)


def text(fields: Fields, release: bool) -> Item:
    """{text}, all of it scored."""
    del release
    return Item(options=(("", get_text(fields, "text")),))


def squad_questions(fields: Fields) -> Iterator[Fields]:
    """The questions of SQuAD's own file, {data: [{paragraphs: [{context, qas}]}]}; any other row is a question."""
    if "data" not in fields:
        yield fields
        return
    try:
        for article in fields["data"]:
            for paragraph in article["paragraphs"]:
                yield from ({**question, "context": paragraph["context"]} for question in paragraph["qas"])
    except (KeyError, TypeError) as error:
        raise BadRecord(f"not SQuAD's form ({error})") from error


def wikihow(text: str) -> str:
    """Without the marks that WikiHow's pages left in HellaSwag, as the common harnesses clean it."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def texts_of(fields: Fields, key: str) -> list[str]:
    """A list of texts."""
    values = fields.get(key)
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise BadRecord(f"no list of texts under {key!r} (it has {', '.join(map(str, fields))})")
    return values


def _choice(fields: Fields, prompt: str, options: list[str], key: str, first: int, release: bool) -> Item:
    """Options after one prompt, a space before each but in the release."""
    blank = "" if release else " "
    return Item(tuple((prompt, blank + option) for option in options), gold=_index(fields, key, len(options), first))


def _index(fields: Fields, key: str, count: int, first: int = 0) -> int:
    """The right option, counted from 0; in the file it is counted from `first`, a number or its digits."""
    value = fields.get(key)
    if not (isinstance(value, int) or (isinstance(value, str) and value.strip().isdecimal())):
        raise BadRecord(f"{value!r} under {key!r} where the number of the right option was expected")
    if not 0 <= int(value) - first < count:
        raise BadRecord(f"{value} under {key!r}, and the options are {first} .. {first + count - 1}")
    return int(value) - first


def _answered(prompt: str, answers: tuple[str, ...], release: bool) -> Item:
    return Item(prompt=prompt.removesuffix(" ") + " " * release, answers=answers,
                solution=answers[0] if release else " " + answers[0])


# ---- Problems that are answered by reasoning: from a row of a task's file to its question, directly or step by step.
#
# The tasks whose names end in `_cot` ask for the reasoning first (Kojima et al., arXiv 2205.11916), and their examples
# show it (Wei et al., arXiv 2201.11903).


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
