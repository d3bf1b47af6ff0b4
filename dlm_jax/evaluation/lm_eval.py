"""A candidate as a model of lm-eval, the field's harness: any of its tasks, by its own prompts, filters and metrics.

    from lm_eval import simple_evaluate
    simple_evaluate(HarnessLM(candidate), tasks=["hellaswag", "lambada_openai"], bootstrap_iters=1000)

It needs the package lm-eval; nothing else in the library imports this module.
"""

import collections
import math
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from dlm_jax.errors import ConfigError, DataError
from dlm_jax.evaluation import items
from dlm_jax.evaluation.eval_model import EvalModel, GenerationRequest, Pair
from dlm_jax.evaluation.items import Item
from dlm_jax.evaluation.run import pairs_of
from dlm_jax.evaluation.tasks import Task

try:
    from lm_eval.api.model import LM
except ImportError as error:
    raise ConfigError("the field's harness is not installed: pip install 'dlm-jax[evaluation]'") from error

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from transformers import PreTrainedTokenizerBase

_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first that is given counts
_SAMPLING = ("top_p", "top_k", "min_p", "typical_p")  # without effect where the likeliest tokens are taken


class _Question(NamedTuple):
    """Requests that belong together: the options of a document, or one request alone.

    Attributes:
      task, document: as the harness names and numbers them.
      noise: the number that random numbers are drawn from, in 0 .. 2**32 - 1.
      places: where the requests stand in the call.
    """

    task: str
    document: int
    noise: int
    places: list[int]


class _Settings(NamedTuple):
    """What `generation_kwargs` ask for; `length` in tokens."""

    until: tuple[str, ...]
    length: int
    temperature: float


class HarnessLM(LM):
    """A candidate as lm-eval's `LM`. Every call hands all its requests to the candidate at once.

    Likelihoods are in nats: minus the candidate's scores, so that a diffusion model's are lower bounds. Context and
    continuation are tokenised as under the protocol `default` (`run.pairs_of`). Noise depends on the task's name and
    the document's number alone, so that the options of a question meet the same. Repetitions of a request
    (`repeats: N`) meet noise of their own.

    Attributes:
      shortened: of each task whose texts are shorter than it asks, (tokens asked for, tokens written).
    """

    def __init__(self, eval_model: EvalModel, *, tokenizer: "PreTrainedTokenizerBase | None" = None,
                 num_steps: int | None = None, max_gen_toks: int = 256, greedy: bool | None = None):
        """Wraps a candidate.

        Args:
          tokenizer: for chat templates; `eval_model.encode` is what tokenises.
          num_steps: forward passes for each text that is written; None leaves it to the candidate.
          max_gen_toks: how many tokens are written where a task does not say. At most half of the candidate's row is
            written, whatever the task says.
          greedy: for which requests `is_greedy` is found out; for the others it is False. It costs about as much as
            their scores. None: for those that stand alone in their document, of which the metric `acc` is made (as
            lambada_openai's); the options of a multiple choice need it for the metric `exact_match` only. False: for
            none, and metrics made of it are not to be trusted. True: for all.

        Raises:
          ConfigError: a number is less than 1.
        """
        super().__init__()
        for name, value in (("num_steps", num_steps), ("max_gen_toks", max_gen_toks)):
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        self.eval_model, self.tokenizer, self.shortened = eval_model, tokenizer, {}
        self._num_steps, self._max_gen_toks, self._greedy = num_steps, max_gen_toks, greedy
        # Bootstraps of the harness would fork, which the threads of JAX do not survive.
        os.environ.setdefault("DISABLE_MULTIPROC", "1")

    @property
    def max_length(self) -> int | None:
        """Tokens of a row at most; None: no limit."""
        return self.eval_model.max_length

    def loglikelihood(self, requests: "Sequence[Instance]") -> list[tuple[float, bool]]:
        """Of each (context, continuation): log p(continuation | context) in nats or a bound, and `is_greedy`.

        Raises:
          ConfigError: the candidate does not score, or does not know what is greedy and is asked.
          DataError: a continuation has no token, or more than the model takes.
        """
        self._check("score", requests)
        pairs: list[Pair] = [Pair((), ())] * len(requests)
        asked = []
        for question in _questions(requests):
            item = Item(tuple(requests[place].args[:2] for place in question.places))
            task = Task(question.task, "choice", items.text)
            for place, pair in zip(question.places, pairs_of(self.eval_model, task, item, question.document),
                                   strict=True):
                pairs[place] = pair._replace(item=question.noise)
            if self._greedy or (self._greedy is None and len(question.places) == 1):
                asked += question.places
        if asked and self.eval_model.greedy is None:
            raise ConfigError(f"{self.eval_model.name} does not say what is greedy, which metrics of the task "
                              f"{requests[asked[0]].task_name} may be made of; give the Candidate a `greedy`, or the "
                              "HarnessLM greedy=False and do not trust them")
        scores = self.eval_model.score(pairs)
        greedy = dict(zip(asked, self.eval_model.greedy([pairs[place] for place in asked]) if asked else (),
                          strict=True))
        return self._answer("loglikelihood", requests, [
            (-float(score), bool(greedy.get(place))) for place, score in enumerate(scores)])

    def loglikelihood_rolling(self, requests: "Sequence[Instance]") -> list[float]:
        """Of each (text,): its log-probability in nats, or a bound.

        What is longer than a row goes in windows: every token is scored once, windows after the first have one token
        of context, and the last as many as there is room for.
        """
        self._check("score", requests)
        pairs, owner = [], []
        for question in _questions(requests):
            for place in question.places:
                tokens = self.eval_model.encode(requests[place].args[0])
                size = max(len(tokens), 1) if self.max_length is None else self.max_length - 1
                for number, (context, continuation) in enumerate(_windows(tokens, size)):
                    pairs.append(Pair(context, continuation, _noise(question.noise, number), number))
                    owner.append(place)
        found: list[list[float]] = [[] for _ in requests]
        for place, score in zip(owner, self.eval_model.score(pairs) if pairs else (), strict=True):
            found[place].append(float(score))
        return self._answer("loglikelihood_rolling", requests, [-math.fsum(scores) for scores in found])

    def generate_until(self, requests: "Sequence[Instance]") -> list[str]:
        """Of each (context, generation_kwargs): what is written after the context, up to the first of `until`.

        `do_sample`, `temperature` and the number of tokens are heeded. A prompt that is too long loses its beginning.

        Raises:
          ConfigError: the candidate does not write, or is asked for something that no candidate does.
        """
        self._check("write", requests)
        settings = [self._settings(request) for request in requests]
        blanks = [GenerationRequest("", "", range(0))] * len(requests)
        for question in _questions(requests):
            for place in question.places:
                length = settings[place].length
                blanks[place] = GenerationRequest(requests[place].args[0], "", range(length, length + 1), question.noise)
        texts = [""] * len(requests)
        for temperature in sorted({setting.temperature for setting in settings}):
            members = [place for place, setting in enumerate(settings) if setting.temperature == temperature]
            written = self.eval_model.write([blanks[place] for place in members], temperature=temperature,
                                           num_steps=self._num_steps)
            for place, text in zip(members, written, strict=True):
                texts[place] = _cut(text, settings[place].until)
        return self._answer("generate_until", requests, texts)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The messages as one prompt, without the BOS token that stands before every row anyway.

        Raises:
          ConfigError: there is no chat template.
        """
        self.chat_template(True)
        text = self.tokenizer.apply_chat_template(chat_history, tokenize=False,
                                                  add_generation_prompt=add_generation_prompt,
                                                  continue_final_message=not add_generation_prompt)
        return text.removeprefix(self.tokenizer.bos_token or "")

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The tokenizer's chat template, for the harness's records; "" where none is wanted.

        Raises:
          ConfigError: there is none, or more than one.
        """
        if not chat_template:
            return ""
        found = getattr(self.tokenizer, "chat_template", None)
        if not isinstance(found, str):
            raise ConfigError(f"{self.eval_model.name} has {'several chat templates' if found else 'no chat template'}; "
                              "give the HarnessLM a tokenizer with one, or leave apply_chat_template out")
        return found

    @property
    def tokenizer_name(self) -> str:
        """What the harness's cache of prompts goes by."""
        return str(getattr(self.tokenizer, "name_or_path", self.eval_model.name)).replace("/", "__")

    def get_model_info(self) -> dict[str, str]:
        """What the harness's results say of the model."""
        return {"model": self.eval_model.name}

    def _check(self, ability: str, requests: "Sequence[Instance]") -> None:
        if getattr(self.eval_model, ability) is None:
            raise ConfigError(f"{self.eval_model.name} cannot {ability}, which the task {requests[0].task_name} asks "
                              "for")

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
    """The requests by task, document and repetition. Those made by hand, with no document, go by their context."""
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
    """The same number for the same key, in every process and version."""
    return zlib.crc32(repr(key).encode())


def _windows(tokens: Sequence[int], size: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(context, continuation) of a text in rows of `size` tokens, every token in one continuation."""
    start, stop = 0, min(size, len(tokens))
    while start < len(tokens):
        yield tuple(tokens[max(stop - size, 0) : start]), tuple(tokens[start:stop])
        start, stop = stop, min(stop + max(size - 1, 1), len(tokens))


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
            raise ConfigError(f"the task {task} asks for {name}={value} in its generation_kwargs, which is not done "
                              "here; leave it out, or give others with gen_kwargs")
    length = (lengths or [length])[0]
    if length < 1:
        raise DataError(f"the task {task} asks for texts of {length} tokens; set max_gen_toks to 1 or more")
    return _Settings((until,) if isinstance(until, str) else tuple(until), length, temperature)


def _cut(text: str, until: Iterable[str]) -> str:
    """`text` before the first of `until` in it."""
    return text[: min((text.find(stop) for stop in until if stop and stop in text), default=len(text))]
