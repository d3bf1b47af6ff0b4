"""Metrics of generated texts: pure functions of strings, with values between 0 and 1.

`METRICS` compares a text with accepted answers. `ANSWERS` extracts the answer from a text, so that samples can vote
(self-consistency, arXiv 2203.11171).
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Hashable, Sequence

from dlm_jax.errors import DataError

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_DIGITS = r"-?\$?(?:\d[\d,]*(?:\.\d[\d,]*)?|\.\d[\d,]*)"  # -$1,250.50 and .5 too
_NUMBER = re.compile(_DIGITS)
_MARKED = re.compile(rf"####[ \t]*({_DIGITS})")
_STATED = re.compile(rf"answer is[^\d\n]*?({_DIGITS})", re.IGNORECASE)
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3})")
# A letter that may be in Markdown, in parentheses or in LaTeX, and is no word: "A" and "I" before another word are.
_BEFORE = r"(?:[\s*_$(\[{\"'`]|\\\(|\\(?:boxed|text|textbf|mathrm|mathbf)\b)*"
_CHOICE = rf"{_BEFORE}([A-Z])(?![\w'’])(?!(?<=[AI])\s+(?!because\b|since\b|as\b)\w)"
# After "answer is" or "Answer:"; in the last box; at the start, alone or before punctuation; the last in parentheses.
_LETTERS = (re.compile(rf"[Aa]nswer(?:\s+is|[*_]*:)[*_]*:?{_CHOICE}"),
            re.compile(rf".*\\boxed{_CHOICE}", re.DOTALL),
            re.compile(rf"{_BEFORE}([A-Z])(?=[).:,*_$}}\]\"'`\\]|\s*\n|\s*$)"),
            re.compile(r".*\(([A-Z])\)", re.DOTALL))


def normalize(text: str) -> str:
    """Lower-cases and removes punctuation, articles and extra spaces, as SQuAD's evaluation does (arXiv 1606.05250)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """Returns whether it is one of the answers, all normalized; answers that become empty are dropped."""
    return float(normalize(prediction) in {normalize(answer) for answer in answers} - {""})


def contains(prediction: str, answers: Sequence[str]) -> float:
    """Returns whether it contains one of the answers, all normalized: what the reference calls exact match."""
    return float(any(answer in normalize(prediction) for answer in {normalize(answer) for answer in answers} - {""}))


def token_f1(prediction: str, answers: Sequence[str]) -> float:
    """Returns the best F1 of words over the answers, normalized, as in SQuAD."""
    return best(lambda answer: f_measure(*_overlap(normalize(prediction).split(), normalize(answer).split())), answers)


def first_word(prediction: str, answers: Sequence[str]) -> float:
    """Returns whether its first word, without outer punctuation, is one of the answers (LAMBADA, arXiv 1606.06031)."""
    return float(_first_word(prediction) in {answer.strip(string.punctuation) for answer in answers})


def stripped_match(prediction: str, answers: Sequence[str]) -> float:
    """Returns whether it is one of the answers, ignoring spaces at both ends."""
    return float(prediction.strip() in {answer.strip() for answer in answers})


def strict_match(prediction: str, answers: Sequence[str]) -> float:
    """Returns whether the first number after a `####` is an answer, as GSM8K's own grader finds it (arXiv 2110.14168).

    Text after the number does not count, nor a `####` without a number; 18, 18.0 and $18 are equal.
    """
    return _is_among(_strict(prediction), answers)


def last_number(prediction: str, answers: Sequence[str]) -> float:
    """Returns whether the last number in it is an answer."""
    return _is_among(_last(prediction), answers)


def stated_number(prediction: str, answers: Sequence[str]) -> float:
    """Returns whether the number after "The answer is" is an answer (Wei et al., arXiv 2201.11903)."""
    return _is_among(_stated(prediction), answers)


def chosen_letter(prediction: str, answers: Sequence[str]) -> float:
    """Returns whether the chosen letter is an answer.

    It is the letter after "The answer is" or "Answer:"; else the one in the last `\\boxed`; else one at the start; else
    the last one in parentheses.
    """
    return float(_letter(prediction) in answers)


def reference_match(prediction: str, answers: Sequence[str]) -> float:
    """Returns whether the text after `####` equals an answer without commas, as in the reference's GSM8K."""
    after = prediction.partition("####")[2].replace(",", "").strip()
    return float(after in {answer.replace(",", "").strip() for answer in answers})


def rouge_n(prediction: str, reference: str, n: int) -> float:
    """Returns ROUGE-n: F1 of n-grams with their counts (Lin, 2004)."""
    grams = [Counter(zip(*(words[start:] for start in range(n)), strict=False))
             for words in (_words(prediction), _words(reference))]
    return f_measure((grams[0] & grams[1]).total(), grams[0].total(), grams[1].total())


def rouge_l(prediction: str, reference: str) -> float:
    """Returns ROUGE-L: F1 of the longest common subsequence of words (Lin, 2004)."""
    words, reference_words = _words(prediction), _words(reference)
    longest = [0] * (len(reference_words) + 1)  # common with each prefix of the reference
    for word in words:
        before = longest.copy()
        for place, other in enumerate(reference_words):
            longest[place + 1] = before[place] + 1 if word == other else max(before[place + 1], longest[place])
    return f_measure(longest[-1], len(words), len(reference_words))


def f_measure(common: int, predicted: int, expected: int) -> float:
    """Returns the harmonic mean of common / predicted and common / expected; 0 if `common` is 0."""
    return 2 * common / (predicted + expected) if common else 0.0


def best(score: Callable[[str], float], answers: Sequence[str]) -> float:
    """Returns the best score of any answer."""
    if not answers:
        raise DataError("there is no answer to compare with")
    return max(map(score, answers))


def answer_after(text: str, marker: str = "####") -> str | None:
    """Returns the text after the first marker up to the end of its line, as in GSM8K: "#### 1,250" gives "1250".

    Spaces around it and commas between thousands are removed. None: there is no marker, or nothing after it.
    """
    _, _, rest = text.partition(marker)
    return _THOUSANDS.sub("", rest.partition("\n")[0].strip()) or None


def majority(answers: Sequence[str | None]) -> str | None:
    """Returns the most frequent answer, the first of equally frequent ones; None, which does not vote, if alone."""
    votes = Counter(answer for answer in answers if answer is not None)
    return votes.most_common(1)[0][0] if votes else None


METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "exact_match": exact_match,
    "contains": contains,
    "f1": token_f1,
    "first_word": first_word,
    "stripped_match": stripped_match,
    "strict_match": strict_match,
    "last_number": last_number,
    "stated_number": stated_number,
    "chosen_letter": chosen_letter,
    "reference_match": reference_match,
    "rouge1": lambda text, answers: best(lambda answer: rouge_n(text, answer, 1), answers),
    "rouge2": lambda text, answers: best(lambda answer: rouge_n(text, answer, 2), answers),
    "rougeL": lambda text, answers: best(lambda answer: rouge_l(text, answer), answers),
}


def _overlap(words: Sequence[Hashable], others: Sequence[Hashable]) -> tuple[int, int, int]:
    return (Counter(words) & Counter(others)).total(), len(words), len(others)


def _first_word(text: str) -> str | None:
    words = text.split()
    return words[0].strip(string.punctuation) if words else None


def _strict(text: str) -> str | None:
    found = _MARKED.search(text)
    return _value(found[1]) if found else None


def _last(text: str) -> str | None:
    found = _NUMBER.findall(text)
    return _value(found[-1]) if found else None


def _stated(text: str) -> str | None:
    found = _STATED.search(text)
    return _value(found[1]) if found else None


def _letter(text: str) -> str | None:
    stated, boxed, first, last = _LETTERS
    found = stated.search(text) or boxed.match(text) or first.match(text) or last.match(text)
    return found[1] if found else None


def _is_among(value: str | None, answers: Sequence[str]) -> float:
    return float(value is not None and value in map(_value, answers))


def _words(text: str) -> list[str]:
    """Returns runs of a-z and 0-9 in lower case, as the reference implementation of ROUGE does without stemming."""
    return re.findall(r"[a-z0-9]+", text.lower())


def _value(text: str | None) -> str | None:
    """Returns a number as it is compared and voted on: 18, 18.0 and $18 are "18.0"."""
    try:
        return str(float(re.sub(r"[,$\s]", "", text or "").rstrip("%.")) + 0.0)  # -0.0 is 0.0
    except ValueError:
        return None


# By metric: extracts from a text the answer that the metric judges, or None. Equal answers have equal values.
ANSWERS: dict[str, Callable[[str], str | None]] = {
    "exact_match": lambda text: normalize(text) or None,
    "first_word": _first_word,
    "strict_match": _strict,
    "last_number": _last,
    "stated_number": _stated,
    "chosen_letter": _letter,
}
