"""Parts of a text."""

import re

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
