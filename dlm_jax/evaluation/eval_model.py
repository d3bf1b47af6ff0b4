"""A model as the evaluation sees it: something that scores and something that writes, any Python callables."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np


class Pair(NamedTuple):
    """Token ids of a context and of what is scored after it.

    Attributes:
      item: the number of the item, from which noise is drawn, so that its options meet the same.
      option: which of the item's options it is.
    """

    context: tuple[int, ...]
    continuation: tuple[int, ...]
    item: int = 0
    option: int = 0


class GenerationRequest(NamedTuple):
    """A place to write at: after `before` and, for infilling, before `after`.

    Attributes:
      lengths: how many tokens, the model's own; several where the model is to settle it.
      item, sample: the number of the item, and which of its samples it is; from the two random numbers are drawn.
    """

    before: str
    after: str
    lengths: range
    item: int = 0
    sample: int = 0


class Score(Protocol):
    """Gives each pair's -log p(continuation | context) in nats, or a bound on it."""

    def __call__(self, pairs: Sequence[Pair]) -> Sequence[float]: ...


class Write(Protocol):
    """Gives what it writes at each blank, without the text around it.

    `temperature` 0 takes the likeliest tokens; `num_steps` is the number of forward passes of a model that denoises,
    None its own choice. A model without steps takes no notice of them.
    """

    def __call__(self, blanks: Sequence[GenerationRequest], *, temperature: float,
                 num_steps: int | None) -> Sequence[str]: ...


class Greedy(Protocol):
    """Tells of each pair whether the model, at the likeliest tokens, writes just this continuation at its length."""

    def __call__(self, pairs: Sequence[Pair]) -> Sequence[bool]: ...


class MaskedPrediction(Protocol):
    """Of each pair the share of the continuation's tokens that the model takes to be the likeliest, among those asked
    for: bool [length], not empty. A model that denoises sees all others, one from left to right what stands before."""

    def __call__(self, pairs: Sequence[Pair], asked: Sequence[np.ndarray]) -> Sequence[float]: ...


@dataclasses.dataclass(frozen=True)
class EvalModel:
    """What is evaluated.

    Attributes:
      name: as the table shows it.
      encode: text to token ids, none of them special.
      score: None: tasks that score cannot be run.
      write: None: tasks that write cannot be run.
      max_length: tokens of a row at most, with the one at position 0 that holds no text; contexts lose their beginning
        to fit. None: no limit.
      autoregressive: whether it goes from left to right, so that it sees nothing behind a blank.
      release_temperature: at which the released scripts fill gaps with this family.
      encode_special: as the tokenizer's own `encode`, special tokens included; the protocol `release` uses it.
      greedy: None: metrics of the field's harness that are made of it cannot be had.
      guess: None: texts cannot be reconstructed.
    """

    name: str
    encode: Callable[[str], list[int]]
    score: Score | None = None
    write: Write | None = None
    max_length: int | None = None
    autoregressive: bool = False
    release_temperature: float = 0.95
    encode_special: Callable[[str], list[int]] | None = None
    greedy: Greedy | None = None
    guess: MaskedPrediction | None = None
