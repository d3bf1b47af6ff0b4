"""Metrics of texts: pure functions of strings, with values between 0 and 1."""

import math
import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_DIGITS = r"-?\$?(?:\d[\d,]*(?:\.\d[\d,]*)?|\.\d[\d,]*)"  # -$1,250.50 and .5 too
_MARKED = re.compile(rf"####[ \t]*({_DIGITS})")
_SENTENCE = re.compile(r".*?[.!?][\"'”’]*(?=\s|$)", re.DOTALL)


def strict_match(prediction: str, answer: str) -> float:
    """Returns whether the first number after a `####` is the answer, as GSM8K's own grader finds it (arXiv 2110.14168).

    Text after the number does not count, nor a `####` without a number; 18, 18.0 and $18 are equal.
    """
    found = _MARKED.search(prediction)
    value = _value(found[1]) if found else None
    return float(value is not None and value == _value(answer))


def rouge_n(prediction: str, reference: str, n: int) -> float:
    """Returns ROUGE-n: F1 of n-grams with their counts (Lin, 2004)."""
    grams = [Counter(zip(*(words[start:] for start in range(n)), strict=False))
             for words in (_words(prediction), _words(reference))]
    return _f_measure((grams[0] & grams[1]).total(), grams[0].total(), grams[1].total())


def rouge_l(prediction: str, reference: str) -> float:
    """Returns ROUGE-L: F1 of the longest common subsequence of words (Lin, 2004)."""
    words, reference_words = _words(prediction), _words(reference)
    longest = [0] * (len(reference_words) + 1)  # common with each prefix of the reference
    for word in words:
        before = longest.copy()
        for place, other in enumerate(reference_words):
            longest[place + 1] = before[place] + 1 if word == other else max(before[place + 1], longest[place])
    return _f_measure(longest[-1], len(words), len(reference_words))


def distinct(texts: Iterable[str], n: int) -> float:
    """Returns distinct-n of all texts together: the share of their word n-grams that are different (arXiv 1510.03055).

    Words are separated by spaces and lower-cased. nan: no text has n words.
    """
    grams = [gram for text in texts for words in [text.lower().split()]
             for gram in zip(*(words[start:] for start in range(n)), strict=False)]
    return len(set(grams)) / len(grams) if grams else math.nan


def normalize(text: str) -> str:
    """Lower-cases and removes punctuation, articles and extra spaces, as SQuAD's evaluation does (arXiv 1606.05250)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def contains(prediction: str, answers: Sequence[str]) -> float:
    """Returns whether it contains one of the answers, all normalized."""
    return float(any(answer in normalize(prediction) for answer in {normalize(answer) for answer in answers} - {""}))


def token_f1(prediction: str, answers: Sequence[str]) -> float:
    """Returns the best F1 of words over the answers, normalized, as in SQuAD."""
    words = normalize(prediction).split()
    return max(_f_measure((Counter(words) & Counter(other)).total(), len(words), len(other))
               for other in (normalize(answer).split() for answer in answers))


def first_sentence(text: str) -> str:
    """Returns the first sentence of a text, or all of it if none ends."""
    found = _SENTENCE.match(text.strip())
    return found[0] if found else text.strip()


def _f_measure(common: int, predicted: int, expected: int) -> float:
    """Returns the harmonic mean of common / predicted and common / expected; 0 if `common` is 0."""
    return 2 * common / (predicted + expected) if common else 0.0


def _words(text: str) -> list[str]:
    """Returns runs of a-z and 0-9 in lower case, as the reference implementation of ROUGE does without stemming."""
    return re.findall(r"[a-z0-9]+", text.lower())


def _value(text: str) -> str | None:
    """Returns a number as it is compared: 18, 18.0 and $18 are "18.0"."""
    try:
        return str(float(re.sub(r"[,$\s]", "", text).rstrip("%.")) + 0.0)  # -0.0 is 0.0
    except ValueError:
        return None
