"""What each forward pass changed in a row, for clients that show a text while it is denoised."""

import itertools
from collections.abc import Collection, Sequence
from typing import Any

from dlm_jax.sampling.text import GAP, TokenTexts
from dlm_jax.sampling.trace import Change
from dlm_jax.serving.text import finite

MASK = "\N{LIGHT SHADE}"


class RowSteps:
    """The steps of a row as JSON objects.

    A special token, such as the end of text, says so and has its name as text. `joined` lists the characters that
    several tokens spell, as (first position, number of tokens, character), where there are any.

    Args:
      row: tokens, GAP in gaps.
      first: the position at which the `text` of a step starts: 0, or where a chat's response starts.
      ends: tokens after which nothing is shown; () where gaps are filled to their end.
    """

    def __init__(self, index: int, row: Sequence[int], texts: TokenTexts, *, first: int = 0,
                 ends: Collection[int] = ()):
        self._index, self._texts, self._first, self._ends = index, texts, first, ends
        self._tokens, self._given = list(row), [token != GAP for token in row]

    def start(self) -> dict[str, Any]:
        """Returns step 0, with every position of the row."""
        return self._body(0, [{**self._token(position, token, 0.0), "given": self._given[position]}
                              for position, token in enumerate(self._tokens)])

    def update(self, changes: Sequence[Change], step: int) -> dict[str, Any]:
        """Returns a step with its changes."""
        for change in changes:
            self._tokens[change.position] = change.token
        return self._body(step, [self._token(change.position, change.token, change.log_prob) for change in changes])

    def _body(self, step: int, tokens: list[dict[str, Any]]) -> dict[str, Any]:
        joined = self._texts.joined(self._tokens)
        return {"index": self._index, "step": step, "tokens": tokens, "text": self._text(),
                **({"joined": joined} if joined else {})}

    def _token(self, position: int, token: int, log_prob: float) -> dict[str, Any]:
        if token == GAP:
            return {"position": position, "id": None, "text": MASK, "logprob": None}
        return {"position": position, "id": token, "text": self._texts.text(token),
                "logprob": None if self._given[position] else finite(log_prob),
                **({"special": True} if self._texts.is_special(token) else {})}

    def _text(self) -> str:
        """Returns the text so far, with a `MASK` per masked token, up to the first token that ends it."""
        shown = range(self._first, len(self._tokens))
        end = next((i for i in shown if not self._given[i] and self._tokens[i] in self._ends), len(self._tokens))
        found = []
        for masked, group in itertools.groupby(range(self._first, end), key=lambda i: self._tokens[i] == GAP):
            run = list(group)
            if masked:
                found.append(MASK * len(run))
            else:
                tokens = [self._tokens[i] for i in run]
                found.append(self._texts.decode(tokens) if run[0] == self._first else self._texts.added(tokens))
        return "".join(found)
