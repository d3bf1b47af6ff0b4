"""From a row of a task's file to what a model is asked. Each function takes the fields of a row and the protocol.

Under the protocol `release` prompts and options are those of the released scripts, their spaces included; see
`tasks` for where that differs from what is right.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

from dlm_jax.data.records import BadRecord, get_text

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
