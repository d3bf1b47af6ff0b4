"""A model as the evaluation sees it: functions that score and generate."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from dlm_jax.errors import ConfigError, DataError

if TYPE_CHECKING:
    from dlm_jax.sampling.batching import SamplingStats


class Pair(NamedTuple):
    """Token ids of a context and of the continuation that is scored.

    Attributes:
      item: number of the item. Noise is a function of it, so that all options of an item get the same noise.
      option: index of the option among the item's options.
      add_bos: whether a BOS token precedes the context; False: the context's first token is at position 0.
    """

    context: tuple[int, ...]
    continuation: tuple[int, ...]
    item: int = 0
    option: int = 0
    add_bos: bool = True


class GenerationRequest(NamedTuple):
    """A gap to fill: after `before` and, for infilling, before `after`.

    Attributes:
      lengths: lengths of the gap in tokens; where there are several, the model chooses.
      item, sample: numbers of the item and of its sample, which determine the random numbers.
    """

    before: str
    after: str
    lengths: range
    item: int = 0
    sample: int = 0


class Score(Protocol):
    """Returns -log p(continuation | context) of each pair in nats, or a bound on it.

    An estimate may come as [pairs, 2], from each half of its forward passes: it is their mean, and their difference
    shows its error.
    """

    def __call__(self, pairs: Sequence[Pair]) -> Sequence[float] | np.ndarray: ...


class Generate(Protocol):
    """Returns the text for each request, without the text around it.

    `temperature` 0 takes the most likely tokens. `num_steps` is the number of forward passes of a diffusion model, None
    its own choice; an autoregressive model ignores it.
    """

    def __call__(self, requests: Sequence[GenerationRequest], *, temperature: float,
                 num_steps: int | None) -> Sequence[str]: ...


class IsGreedy(Protocol):
    """Returns for each pair whether greedy generation of the same length gives exactly this continuation."""

    def __call__(self, pairs: Sequence[Pair]) -> Sequence[bool]: ...


class ScoreAndIsGreedy(Protocol):
    """Returns what `Score` and `IsGreedy` do, float64 [pairs] and bool [pairs], at the cost of one."""

    def __call__(self, pairs: Sequence[Pair]) -> tuple[np.ndarray, np.ndarray]: ...


class MaskedAccuracy(Protocol):
    """Returns for each pair the share of the masked tokens whose top-1 prediction is right.

    `masked` has a bool [length] for each continuation, not all False. A diffusion model sees all other tokens, an
    autoregressive model the tokens before each.
    """

    def __call__(self, pairs: Sequence[Pair], masked: Sequence[np.ndarray]) -> Sequence[float]: ...


@dataclasses.dataclass(frozen=True)
class EvalModel:
    """A model to be evaluated.

    Attributes:
      name: as the table shows it.
      encode: text to token ids, without special tokens.
      score: None: tasks that score are refused.
      generate: None: tasks that generate are refused.
      max_length: tokens per row at most, the context token at position 0 included; contexts are cut from the left to
        fit. None: no limit.
      autoregressive: whether it generates from left to right, and so ignores the text after a gap.
      reference_temperature: temperature at which the reference scripts infill with this family.
      encode_special: as the tokenizer encodes by default, with special tokens; for the protocol `reference`.
      is_greedy: None: lm-eval's metrics that need it are refused, unless there is `score_and_is_greedy`.
      score_and_is_greedy: None: they are computed one after the other.
      masked_accuracy: None: reconstruction is refused.
      stats: counts what `generate` has done so far; None: nobody counts.
    """

    name: str
    encode: Callable[[str], list[int]]
    score: Score | None = None
    generate: Generate | None = None
    max_length: int | None = None
    autoregressive: bool = False
    reference_temperature: float = 0.95
    encode_special: Callable[[str], list[int]] | None = None
    is_greedy: IsGreedy | None = None
    score_and_is_greedy: ScoreAndIsGreedy | None = None
    masked_accuracy: MaskedAccuracy | None = None
    stats: "SamplingStats | None" = None


def score_pairs(model: EvalModel, pairs: Sequence[Pair], checked: np.ndarray,
                where: str) -> tuple[Sequence[float] | np.ndarray, np.ndarray]:
    """Returns the scores, and whether each pair that is `checked`, bool [pairs], is greedy; False for the others.

    Args:
      where: whose metrics need it, for the error.

    Raises:
      ConfigError: the model cannot say what is greedy.
    """
    is_greedy = np.zeros(len(pairs), bool)
    if not checked.any():
        return model.score(pairs), is_greedy
    if model.score_and_is_greedy is not None:
        scores, found = model.score_and_is_greedy(pairs)
        return scores, checked & found
    if model.is_greedy is None:
        raise ConfigError(f"{model.name} has no is_greedy, which metrics of {where} may need; give the EvalModel one, "
                          "or pass is_greedy=False to LmEvalAdapter and ignore these metrics")
    is_greedy[checked] = model.is_greedy([pair for pair, here in zip(pairs, checked, strict=True) if here])
    return model.score(pairs), is_greedy


def make_pair(eval_model: EvalModel, context: str, continuation: str, item: int, option: int, where: str) -> Pair:
    """Tokenizes context and continuation together, and splits them after the tokens that the context has on its own.

    Tokens across the boundary are therefore scored. A context that is too long is cut from the left.

    Args:
      where: names the pair in errors.

    Raises:
      DataError: the continuation has no token, or more than the model takes.
    """
    alone, joined = eval_model.encode(context), eval_model.encode(context + continuation)
    split = next((place for place, (one, other) in enumerate(zip(alone, joined, strict=False)) if one != other),
                 min(len(alone), len(joined)))
    return Pair(fit_context(joined[:split], joined[split:], eval_model, where), tuple(joined[split:]), item, option)


def fit_context(context: Sequence[int], continuation: Sequence[int], eval_model: EvalModel,
                where: str) -> tuple[int, ...]:
    """Returns the end of the context that fits the model beside BOS and the continuation; errors as in `make_pair`."""
    if not continuation:
        raise DataError(f"{where} has no token to score")
    if eval_model.max_length is None:
        return tuple(context)
    room = eval_model.max_length - 1 - len(continuation)
    if room < 1:
        raise DataError(f"{where} has {len(continuation)} tokens to score, and {eval_model.name} takes at most "
                        f"{eval_model.max_length} with a context")
    return tuple(context[-room:])
