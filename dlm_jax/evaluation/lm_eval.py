"""Adapts an `EvalModel` to lm-eval, the LM Evaluation Harness: any of its tasks, with its prompts, filters and metrics.

    from lm_eval import simple_evaluate
    simple_evaluate(LmEvalAdapter(eval_model), tasks=["hellaswag", "lambada_openai"], bootstrap_iters=1000)

It needs the package lm-eval; nothing else in the library imports this module.
"""

import collections
import math
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from dlm_jax.errors import ConfigError, DataError
from dlm_jax.evaluation.eval_model import EvalModel, GenerationRequest, Pair, make_pair

try:
    from lm_eval.api.model import LM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise ConfigError("lm-eval is not installed: pip install 'dlm-jax[evaluation]'") from error

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from transformers import PreTrainedTokenizerBase

_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first one given counts
_SAMPLING = ("top_p", "top_k", "min_p", "typical_p")  # no effect at temperature 0


class _Question(NamedTuple):
    """The requests of one document: the options of a choice, or a single request.

    Attributes:
      task, document: lm-eval's name and number.
      noise: the item number that determines random numbers, in 0 .. 2**32 - 1.
      places: indices of the requests in the call.
    """

    task: str
    document: int
    noise: int
    places: list[int]


class _Settings(NamedTuple):
    """The settings in `generation_kwargs`; `length` in tokens."""

    until: tuple[str, ...]
    length: int
    temperature: float


class LmEvalAdapter(LM):
    """Implements lm-eval's `LM` with an `EvalModel`, which gets all requests of a call at once.

    Log-likelihoods are the negative scores, in nats; for a diffusion model they are lower bounds. Context and
    continuation are tokenized together (`eval_model.make_pair`). Noise depends on the task's name and
    the document's number alone, so all options of a question get the same. Repetitions of a request (`repeats: N`) get
    noise of their own.

    Attributes:
      shortened: (requested tokens, generated tokens) of each task whose texts are shorter than it asks for.
    """

    def __init__(self, eval_model: EvalModel, *, tokenizer: "PreTrainedTokenizerBase | None" = None,
                 num_steps: int | None = None, max_gen_toks: int = 256, is_greedy: bool | None = None):
        """Wraps a model.

        Args:
          tokenizer: for chat templates; text is tokenized by `eval_model.encode`.
          num_steps: forward passes per generated text; None: the model's default.
          max_gen_toks: tokens to generate if a task does not say. The length is at most half of `max_length`, whatever
            the task says.
          is_greedy: for which requests `is_greedy` is computed, at about the cost of their scores; it is False for the
            others. None: for single requests, whose metric `acc` needs it (as lambada_openai's); the options of a
            multiple choice need it for the metric `exact_match` only. True: for all. False: for none, and metrics that
            need it are wrong.

        Raises:
          ConfigError: a number is less than 1.
        """
        super().__init__()
        for name, value in (("num_steps", num_steps), ("max_gen_toks", max_gen_toks)):
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        self.eval_model, self.tokenizer, self.shortened = eval_model, tokenizer, {}
        self._num_steps, self._max_gen_toks, self._is_greedy = num_steps, max_gen_toks, is_greedy
        # lm-eval's bootstrap would fork, which breaks JAX's threads.
        os.environ.setdefault("DISABLE_MULTIPROC", "1")

    @property
    def max_length(self) -> int | None:
        """Returns the largest number of tokens per row; None: no limit."""
        return self.eval_model.max_length

    def loglikelihood(self, requests: "Sequence[Instance]") -> list[tuple[float, bool]]:
        """Returns log p(continuation | context) in nats, or a bound, and `is_greedy` for each (context, continuation).

        Raises:
          ConfigError: the model has no `score`, or no `is_greedy` where it is needed.
          DataError: a continuation has no token, or more than the model takes.
        """
        self._check("score", requests)
        pairs: list[Pair] = [Pair((), ())] * len(requests)
        checked = []  # the requests whose is_greedy is computed
        for question in _questions(requests):
            for option, place in enumerate(question.places):
                context, continuation = requests[place].args[:2]
                pairs[place] = make_pair(self.eval_model, context, continuation, question.noise, option,
                                         f"{question.task}, item {question.document}, option {option}")
            if self._is_greedy or (self._is_greedy is None and len(question.places) == 1):
                checked += question.places
        if checked and self.eval_model.is_greedy is None:
            raise ConfigError(f"{self.eval_model.name} has no is_greedy, which metrics of the task "
                              f"{requests[checked[0]].task_name} may need; give the EvalModel one, or pass "
                              "is_greedy=False to LmEvalAdapter and ignore these metrics")
        scores = self.eval_model.score(pairs)
        found = self.eval_model.is_greedy([pairs[place] for place in checked]) if checked else ()
        is_greedy = dict(zip(checked, found, strict=True))
        return self._answer("loglikelihood", requests, [
            (-float(score), bool(is_greedy.get(place))) for place, score in enumerate(scores)])

    def loglikelihood_rolling(self, requests: "Sequence[Instance]") -> list[float]:
        """Returns the log-probability of each (text,) in nats, or a bound.

        A text longer than a row is split into windows. Every token is scored once; windows after the first have one
        token of context, and the last has as many as fit.
        """
        self._check("score", requests)
        pairs, owner = [], []
        for question in _questions(requests):
            for place in question.places:
                tokens = self.eval_model.encode(requests[place].args[0])
                for number, (context, continuation) in enumerate(self._windows(tokens)):
                    pairs.append(Pair(context, continuation, _noise(question.noise, number), number, number == 0))
                    owner.append(place)
        found: list[list[float]] = [[] for _ in requests]
        for place, score in zip(owner, self.eval_model.score(pairs) if pairs else (), strict=True):
            found[place].append(float(score))
        return self._answer("loglikelihood_rolling", requests, [-math.fsum(scores) for scores in found])

    def generate_until(self, requests: "Sequence[Instance]") -> list[str]:
        """Returns the text generated after each (context, generation_kwargs), up to the first of `until`.

        `do_sample`, `temperature` and the number of tokens are respected. A prompt that is too long is cut from the
        left.

        Raises:
          ConfigError: the model has no `generate`, or generation_kwargs contain an unsupported setting.
        """
        self._check("generate", requests)
        settings = [self._settings(request) for request in requests]
        prompts = [GenerationRequest("", "", range(0))] * len(requests)
        for question in _questions(requests):
            for place in question.places:
                length = settings[place].length
                prompts[place] = GenerationRequest(requests[place].args[0], "", range(length, length + 1),
                                                   question.noise)
        texts = [""] * len(requests)
        for temperature in sorted({setting.temperature for setting in settings}):
            members = [place for place, setting in enumerate(settings) if setting.temperature == temperature]
            generated = self.eval_model.generate([prompts[place] for place in members], temperature=temperature,
                                                 num_steps=self._num_steps)
            for place, text in zip(members, generated, strict=True):
                texts[place] = _truncate(text, settings[place].until)
        return self._answer("generate_until", requests, texts)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Returns the messages as one prompt.

        Raises:
          ConfigError: there is no chat template.
        """
        self.chat_template(True)
        return self.tokenizer.apply_chat_template(chat_history, tokenize=False,
                                                  add_generation_prompt=add_generation_prompt,
                                                  continue_final_message=not add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Returns the tokenizer's chat template for lm-eval's records; "" if `chat_template` is False.

        Raises:
          ConfigError: there is none, or more than one.
        """
        if not chat_template:
            return ""
        found = getattr(self.tokenizer, "chat_template", None)
        if not isinstance(found, str):
            number = "several chat templates" if found else "no chat template"
            raise ConfigError(f"{self.eval_model.name} has {number}; give the LmEvalAdapter a tokenizer with one, or "
                              "leave apply_chat_template out")
        return found

    @property
    def tokenizer_name(self) -> str:
        """Returns the key of lm-eval's prompt cache."""
        return str(getattr(self.tokenizer, "name_or_path", self.eval_model.name)).replace("/", "__")

    def get_model_info(self) -> dict[str, str]:
        """Returns the model's entry in lm-eval's results."""
        return {"model": self.eval_model.name}

    def _windows(self, tokens: Sequence[int]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Yields lm-eval's windows of a text as (context, continuation); each token is in one continuation.

        BOS precedes the first window, which has no context, and no other. The row of a diffusion model holds all of its
        tokens, that of an autoregressive model all but the last.
        """
        size = max(len(tokens), 1)
        if self.max_length is not None:
            size = min(size, max(self.max_length - (not self.eval_model.autoregressive), 1))
        windows = get_rolling_token_windows(list(tokens), prefix_token=None, max_seq_len=size, context_len=1)
        for number, (context, continuation) in enumerate(map(make_disjoint_window, windows)):
            yield tuple(context) if number else (), tuple(continuation)

    def _check(self, capability: str, requests: "Sequence[Instance]") -> None:
        if getattr(self.eval_model, capability) is None:
            raise ConfigError(f"{self.eval_model.name} has no {capability}, which the task {requests[0].task_name} "
                              "needs")

    def _answer(self, kind: str, requests: "Sequence[Instance]", answers: list) -> list:
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial(kind, request.args, answer)
        return answers

    def _settings(self, request: "Instance") -> _Settings:
        settings = _settings(request.args[1], self._max_gen_toks, str(request.task_name))
        if self.max_length is not None and settings.length > self.max_length // 2:
            self.shortened[str(request.task_name)] = settings.length, self.max_length // 2
            settings = settings._replace(length=self.max_length // 2)
        return settings


def _questions(requests: "Iterable[Instance]") -> Iterator[_Question]:
    """Groups requests by task, document and repetition; a request without a document is grouped by its context."""
    found: dict[tuple, list[int]] = {}
    times: collections.Counter = collections.Counter()
    for place, request in enumerate(requests):
        document = request.args[0] if request.doc_id is None else request.doc_id
        same = (request.task_name, document, request.idx, repr(request.args))
        found.setdefault((request.task_name, document, times[same]), []).append(place)
        times[same] += 1
    for number, ((task, document, repetition), places) in enumerate(found.items()):
        yield _Question(str(task), document if isinstance(document, int) else number,
                        _noise(task, document, repetition), places)


def _noise(*key: object) -> int:
    """Returns the same number for the same key, in every process and version."""
    return zlib.crc32(repr(key).encode())


def _settings(asked: Mapping[str, Any], length: int, task: str) -> _Settings:
    asked = {name: value for name, value in asked.items() if value is not None}
    until = asked.pop("until", [])
    lengths = [int(asked.pop(name)) for name in _LENGTHS if name in asked]
    sampled = asked.pop("do_sample", None)
    temperature = float(asked.pop("temperature", 1.0 if sampled else 0.0)) if sampled is not False else 0.0
    asked.pop("temperature", None)
    for name, value in asked.items():
        fine = (name == "num_beams" and value == 1) or (name in _SAMPLING and temperature == 0)
        if not (fine or (name, value) in (("top_p", 1), ("top_k", 0))):
            raise ConfigError(f"the task {task} asks for {name}={value} in its generation_kwargs, which is not "
                              "supported; leave it out, or override it with gen_kwargs")
    length = (lengths or [length])[0]
    if length < 1:
        raise DataError(f"the task {task} asks for texts of {length} tokens; set max_gen_toks to 1 or more")
    return _Settings((until,) if isinstance(until, str) else tuple(until), length, temperature)


def _truncate(text: str, until: Iterable[str]) -> str:
    """Returns `text` up to the first occurrence of any of `until`."""
    return text[: min((text.find(stop) for stop in until if stop and stop in text), default=len(text))]
