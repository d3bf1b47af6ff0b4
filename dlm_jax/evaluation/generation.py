"""Free writing: how likely a judge finds what a model wrote, and how varied all of it is.

Neither says much alone: repetition is likely, and noise is varied.
"""

from collections.abc import Iterable, Sequence

from dlm_jax.data.records import BadRecord, get_text
from dlm_jax.errors import DataError
from dlm_jax.evaluation.items import Fields, Item
from dlm_jax.evaluation.text_parts import cut

SIZES = (1, 2, 3)  # of the n-grams of distinct-n


def opening(fields: Fields, release: bool) -> Item:
    """{prompt}, perhaps empty; or {text}, of which the first sentence is the prompt."""
    del release
    if "prompt" in fields:
        if not isinstance(fields["prompt"], str):
            raise BadRecord("no text under 'prompt'")
        return Item(prompt=fields["prompt"])
    return Item(prompt=cut(get_text(fields, "text"), "sentence"))


def distinct(texts: Iterable[str], n: int) -> float:
    """distinct-n of all texts together: how many different n-grams of words there are, by how many there are at all
    (Li et al., arXiv 1510.03055); words are what stands between spaces, in lower case.

    Raises:
      DataError: no text has n words.
    """
    grams = [gram for text in texts for words in [text.lower().split()]
             for gram in zip(*(words[start:] for start in range(n)), strict=False)]
    if not grams:
        raise DataError(f"no text has {n} words, so that there is no distinct-{n}")
    return len(set(grams)) / len(grams)


def varied(texts: Sequence[str]) -> dict[str, float]:
    """distinct-1, -2, -3, those of which there are any."""
    longest = max((len(text.split()) for text in texts), default=0)
    return {f"distinct_{n}": distinct(texts, n) for n in SIZES if n <= longest}
