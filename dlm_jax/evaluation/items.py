"""Items: what a model is asked, from the fields of a row of a task's file.

Each reader takes the fields of a row and whether the protocol is `reference`. Under `reference` prompts and options are
those of the DiffuLLaMA reference scripts, including their spaces; `tasks` lists the differences.

Tasks whose names end in `_cot` ask for the reasoning first (Kojima et al., arXiv 2205.11916), and their examples show
it (Wei et al., arXiv 2201.11903).
"""

import dataclasses
import re
import string
from collections.abc import Iterator, Mapping
from typing import Any

from dlm_jax.data.records import BadRecord, get_text
from dlm_jax.evaluation.metrics import answer_after

_SENTENCE = re.compile(r".*?[.!?][\"'”’]*(?=\s|$)", re.DOTALL)
_NEXT_QUESTION = re.compile(r"\n\s*(?:Question|Q):")
STEP_BY_STEP = " Let's think step by step."
_CALCULATION = re.compile(r"<<.*?>>")
_LETTERED = re.compile(r"^\(?[A-Z]\)\s*")
_HUB_QUERY = re.compile(r"(?:Q:\s*)?(.*?)\s*Answer Choices:.*", re.DOTALL)

Fields = Mapping[str, Any]

# Tokens of a gap, by the prefix of task_id; long gaps try fewer lengths.
_INFILLING_LENGTHS = {"SingleLine": None, "MultiLine": range(16, 241, 16), "RandomSpan": range(4, 97, 4)}


@dataclasses.dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
      options: (context, continuation) of each option; the continuation is scored.
      parent_options: the options for the parent, where the reference scripts ask it differently.
      gold: index of the right option.
      prompt, suffix: the texts before and after the gap.
      parent_prompt: the prompt for the parent, where the reference scripts ask it differently.
      answers: the accepted answers.
      solution: the text after the prompt in an example; empty: the item cannot be an example.
      tests: code that runs after a completed program.
      one_line: whether the gap is a line.
      lengths: possible lengths of the gap in tokens, if the task's range does not fit.
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
        """Returns the item with its solution, as an example shows it."""
        return "".join(self.options[self.gold]) if self.options else self.prompt + self.solution + self.suffix


def hellaswag(fields: Fields, reference: bool) -> Item:
    """Reads {activity_label, ctx_a, ctx_b, endings, label}, or {query, choices, gold}, which are already cleaned."""
    if "query" in fields:
        return _choice(fields, get_text(fields, "query"), texts_of(fields, "choices"), "gold", 0, reference)
    context = f"{get_text(fields, 'ctx_a')} {get_text(fields, 'ctx_b').capitalize()}"
    prompt = wikihow(f"{get_text(fields, 'activity_label')}: {context}")
    return _choice(fields, prompt, [wikihow(ending) for ending in texts_of(fields, "endings")], "label", 0, reference)


def winogrande(fields: Fields, reference: bool) -> Item:
    """Reads {sentence with a _, option1, option2, answer}, or {context_options, continuation, gold}.

    The rest of the sentence is scored after each option, so that the frequency of a name does not matter (Trinh and Le,
    arXiv 1806.02847). The reference scores the option and the rest, joined without a space.
    """
    if "context_options" in fields and not reference:
        rest = " " + get_text(fields, "continuation").strip()
        contexts = texts_of(fields, "context_options")
        return Item(tuple((context, rest) for context in contexts), gold=_index(fields, "gold", len(contexts)))
    before, gap, rest = get_text(fields, "sentence").partition("_")
    if not gap:
        raise BadRecord("no _ in the sentence")
    names = [get_text(fields, "option1"), get_text(fields, "option2")]
    gold = _index(fields, "answer", 2, first=1)
    if reference:
        return Item(tuple((before, name + rest.strip()) for name in names),
                    tuple((before, f"{name} {rest.strip()}") for name in names), gold=gold)
    return Item(tuple((before + name, rest) for name in names), gold=gold)


def piqa(fields: Fields, reference: bool) -> Item:
    """Reads {goal, sol1, sol2, label}; the reference puts two spaces before an option."""
    prompt = f"Question: {get_text(fields, 'goal')}\nAnswer:"
    options = [get_text(fields, "sol1"), get_text(fields, "sol2")]
    if reference:
        prompt, options = prompt + " ", [f" {option}" for option in options]
    return _choice(fields, prompt, options, "label", 0, reference)


def siqa(fields: Fields, reference: bool) -> Item:
    """Reads {context, question, answerA, answerB, answerC, label}."""
    prompt = f"Question: {get_text(fields, 'context')} {get_text(fields, 'question')}\nAnswer:" + " " * reference
    return _choice(fields, prompt, [get_text(fields, f"answer{letter}") for letter in "ABC"], "label", 1, reference)


def lambada(fields: Fields, reference: bool) -> Item:
    """Reads {text}, whose last word is the answer."""
    del reference
    before, _, word = get_text(fields, "text").strip().rpartition(" ")
    if not before:
        raise BadRecord("fewer than two words, and the last is the answer")
    return Item(prompt=before, answers=(word,), solution=" " + word)


def triviaqa(fields: Fields, reference: bool) -> Item:
    """Reads {question, answer: {value, aliases}}, or {context: the prompt, answer, aliases}."""
    answer = fields.get("answer")
    holder = answer if isinstance(answer, dict) else fields
    value = get_text(holder, "value" if isinstance(answer, dict) else "answer")
    answers = tuple(dict.fromkeys([value, *(texts_of(holder, "aliases") if "aliases" in holder else [])]))
    prompt = (get_text(fields, "context") if "question" not in fields
              else f"Question: {get_text(fields, 'question').rstrip('?')}?\nAnswer:")
    return _answered(prompt, answers, reference)


def squad(fields: Fields, reference: bool) -> Item:
    """Reads {context, question, answers: {text}} or answers as a list of {text}; the reference writes "Quesion"."""
    answers = fields.get("answers")
    texts = texts_of(answers, "text") if isinstance(answers, dict) else [get_text(a, "text") for a in answers or []]
    if not texts:
        raise BadRecord("no answer under 'answers'")
    context, question = get_text(fields, "context"), get_text(fields, "question")
    prompt = (f"{context}\nQuesion{question}?\nAnswer:" if reference else f"{context}\nQuestion: {question}\nAnswer:")
    return _answered(prompt, tuple(dict.fromkeys(texts)), reference)


def rocstories(fields: Fields, reference: bool) -> Item:
    """Reads the columns of the cloze test; the third sentence is the gap, and the fifth is the right ending."""
    del reference
    one, two, three, four = (get_text(fields, f"InputSentence{n}").strip() for n in range(1, 5))
    endings = [get_text(fields, f"RandomFifthSentenceQuiz{n}").strip() for n in (1, 2)]
    five = endings[_index(fields, "AnswerRightEnding", 2, first=1)]
    return Item(prompt=f"{one} {two} ", suffix=f" {four} {five}", answers=(three,), solution=three)


def text(fields: Fields, reference: bool) -> Item:
    """Reads {text}, all of which is scored."""
    del reference
    return Item(options=(("", get_text(fields, "text")),))


def gsm8k(fields: Fields, reference: bool) -> Item:
    """Reads {question, answer}, where the answer is reasoning that ends with `#### number`."""
    question, solution = get_text(fields, "question"), get_text(fields, "answer")
    prompt = question if reference else f"Question: {question}\nAnswer:"
    return _marked(prompt, solution if reference else " " + solution)


def gsm8k_cot(fields: Fields, reference: bool) -> Item:
    """Reads GSM8K for reasoning; examples end with "The answer is", without calculator annotations."""
    item = gsm8k(fields, reference)
    reasoning = _CALCULATION.sub("", item.solution.rpartition("####")[0]).strip()
    return _step_by_step(item, reasoning, item.answers[0])


def gsm8k_symbolic(fields: Fields, reference: bool) -> Item:
    """Reads {text: "question||<<a*b=c>> #### answer"}; as in fine-tuning, the prompt ends with a line break."""
    del reference
    question, bar, solution = get_text(fields, "text").partition("||")
    if not bar:
        raise BadRecord("no || between question and answer")
    return _marked(question.strip() + "\n", solution.strip())


def mawps(fields: Fields, reference: bool) -> Item:
    """Reads {question, result} as on the hub (Calc-MAWPS), or the {sQuestion, lSolutions} of MAWPS and MultiArith."""
    del reference
    if "sQuestion" in fields:
        question, values = get_text(fields, "sQuestion"), fields.get("lSolutions")
        answer = _number(values[0] if isinstance(values, list) and len(values) == 1 else values, "lSolutions")
    else:
        question = get_text(fields, "question")
        key = "result_float" if fields.get("result_float") is not None else "result"
        answer = _number(fields.get(key), key)
    return Item(prompt=f"Question: {question.strip()}\nAnswer:", answers=(answer,), solution=f" {answer}")


def mawps_cot(fields: Fields, reference: bool) -> Item:
    """Reads MAWPS for reasoning; the files have no reasoning in words, so no item can be an example."""
    item = mawps(fields, reference)
    return _step_by_step(item, "", item.answers[0])


def satmath(fields: Fields, reference: bool) -> Item:
    """Reads AGIEval's {question, options, label: "B"} (arXiv 2304.06364), or {query, choices, gold} as on the hub.

    A passage, if there is one, precedes the question.
    """
    del reference
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


def satmath_cot(fields: Fields, reference: bool) -> Item:
    """Reads SATMath for reasoning; examples show AGIEval's solutions."""
    item = satmath(fields, reference)
    other = fields.get("other")
    reasoning = other.get("solution") if isinstance(other, dict) else None
    return _step_by_step(item, reasoning if isinstance(reasoning, str) else "", item.answers[0])


def truncate(text: str, how: str) -> str:
    """Returns the first "line" or "sentence" of a text, its "answer" before another question, or "all" of it."""
    text = text.strip()
    if how == "line":
        return text.partition("\n")[0].strip()
    if how == "answer":
        return _NEXT_QUESTION.split(text, maxsplit=1)[0].strip()
    sentence = _SENTENCE.match(text) if how == "sentence" else None
    return sentence[0] if sentence else text


def humaneval_infilling(fields: Fields, reference: bool) -> Item:
    """Reads {task_id, prompt, suffix, canonical_solution, test, entry_point}: a line, several lines or a random span.

    The reference script for the parents asks for "the middle code" with prefix and suffix in the prompt.
    """
    kind = get_text(fields, "task_id").partition("Infilling")[0]
    if kind not in _INFILLING_LENGTHS:
        raise BadRecord(f"the task_id {fields['task_id']!r} does not start with {', '.join(_INFILLING_LENGTHS)}")
    prompt, suffix = get_text(fields, "prompt"), get_text(fields, "suffix")
    asked = f"The prefix is: {prompt} and the suffix is: {suffix}, please return the middle code: " if reference else ""
    return Item(prompt=prompt, suffix=suffix, parent_prompt=asked, solution=get_text(fields, "canonical_solution"),
                tests=f"{get_text(fields, 'test')}\ncheck({get_text(fields, 'entry_point')})\n",
                one_line=kind == "SingleLine", lengths=_INFILLING_LENGTHS[kind])


def squad_questions(fields: Fields) -> Iterator[Fields]:
    """Yields the questions of SQuAD's original file, {data: [{paragraphs: [{context, qas}]}]}, or the row itself."""
    if "data" not in fields:
        yield fields
        return
    try:
        for article in fields["data"]:
            for paragraph in article["paragraphs"]:
                yield from ({**question, "context": paragraph["context"]} for question in paragraph["qas"])
    except (KeyError, TypeError) as error:
        raise BadRecord(f"not SQuAD's format ({error})") from error


def wikihow(text: str) -> str:
    """Removes WikiHow's markup from a text of HellaSwag, as the common harnesses do."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def texts_of(fields: Fields, key: str) -> list[str]:
    """Returns the list of texts under `key`."""
    values = fields.get(key)
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise BadRecord(f"no list of texts under {key!r} (it has {', '.join(map(str, fields))})")
    return values


def _choice(fields: Fields, prompt: str, options: list[str], key: str, first: int, reference: bool) -> Item:
    """Returns a choice between options after one prompt, each after a space, except under `reference`."""
    space = "" if reference else " "
    return Item(tuple((prompt, space + option) for option in options), gold=_index(fields, key, len(options), first))


def _index(fields: Fields, key: str, count: int, first: int = 0) -> int:
    """Returns the index of the right option, a number or its digits, which the file counts from `first`."""
    value = fields.get(key)
    if not (isinstance(value, int) or (isinstance(value, str) and value.strip().isdecimal())):
        raise BadRecord(f"{value!r} under {key!r} where the number of the right option was expected")
    if not 0 <= int(value) - first < count:
        raise BadRecord(f"{value} under {key!r}, and the options are {first} .. {first + count - 1}")
    return int(value) - first


def _answered(prompt: str, answers: tuple[str, ...], reference: bool) -> Item:
    return Item(prompt=prompt.removesuffix(" ") + " " * reference, answers=answers,
                solution=answers[0] if reference else " " + answers[0])


def _marked(prompt: str, solution: str) -> Item:
    answer = answer_after(solution)
    if answer is None:
        raise BadRecord("no answer after ####")
    return Item(prompt=prompt, answers=(answer,), solution=solution)


def _step_by_step(item: Item, reasoning: str, answer: str) -> Item:
    shown = f" {' '.join(reasoning.split())} The answer is {answer}." if reasoning.strip() else ""
    return Item(prompt=item.prompt + STEP_BY_STEP, answers=item.answers, solution=shown)


def _number(value: Any, key: str) -> str:
    """Returns a number of a file as text: 39.0 and "39" are both "39"."""
    try:
        return f"{float(str(value).replace(',', '')):.12g}"
    except ValueError:
        raise BadRecord(f"{value!r} under {key!r} where a number was expected") from None
