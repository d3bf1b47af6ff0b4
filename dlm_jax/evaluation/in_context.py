"""Learning in context: a prompt made of examples, the answer in a text, and what several samples say together.

Self-consistency (Wang et al., arXiv 2203.11171) is one prompt sampled several times and a vote:

    prompt = few_shot(examples, question)
    texts = lm.generate([prompt] * 3, max_new_tokens=128)
    answer = majority([answer_after(text.removeprefix(prompt)) for text in texts])
"""

import math
import re
from collections import Counter
from collections.abc import Sequence

from dlm_jax.errors import ConfigError, DataError

_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3})")


def few_shot(examples: Sequence[tuple[str, str]], question: str,
             template: str = "Question: {question}\nAnswer: {answer}", separator: str = "\n\n") -> str:
    """A prompt of (question, answer) pairs and a last question, which ends where its answer would begin.

    No examples give a zero-shot prompt in the same form.

    Raises:
      ConfigError: the template lacks {question}, or {answer} after it.
    """
    before, found, after = template.partition("{answer}")
    if not found or "{question}" not in before:
        raise ConfigError(f"the template {template!r} must hold {{question}} and, after it, {{answer}}")
    shown = [before.replace("{question}", asked) + answer + after for asked, answer in examples]
    return separator.join([*shown, before.replace("{question}", question)])


def answer_after(text: str, marker: str = "####") -> str | None:
    """What stands after the first marker, up to the end of its line, as GSM8K writes it: "#### 1,250" gives "1250".

    Spaces around it and commas between thousands go. None: there is no marker, or nothing after it.
    """
    _, _, rest = text.partition(marker)
    return _THOUSANDS.sub("", rest.partition("\n")[0].strip()) or None


def majority(answers: Sequence[str | None]) -> str | None:
    """The most frequent answer, of equals the one seen first; None, which is no answer, if there is no other."""
    votes = Counter(answer for answer in answers if answer is not None)
    return votes.most_common(1)[0][0] if votes else None


def hit_at_k(samples_correct: Sequence[Sequence[bool]], k: int) -> float:
    """The chance that at least one of k samples is correct, averaged over questions: pass@k without bias.

    With c of n samples correct it is 1 - C(n - c, k) / C(n, k) (Chen et al., arXiv 2107.03374, eq. 1).

    Args:
      samples_correct: for each question, whether each of its samples is correct; their numbers may differ.

    Raises:
      DataError: there is no question.
      ConfigError: k is less than 1 or exceeds a question's number of samples.
    """
    if not samples_correct:
        raise DataError("there are no questions to count hits for")
    fewest = min(map(len, samples_correct))
    if not 1 <= k <= fewest:
        raise ConfigError(f"hit@k needs 1 <= k <= the number of samples, got k = {k} where a question has {fewest}")
    chances = [1 - math.comb(len(row) - sum(map(bool, row)), k) / math.comb(len(row), k) for row in samples_correct]
    return math.fsum(chances) / len(chances)
