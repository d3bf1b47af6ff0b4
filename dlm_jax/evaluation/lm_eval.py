"""Adapts an `EvalModel` to lm-eval, the LM Evaluation Harness: any of its tasks, with its prompts, filters and metrics.

    from lm_eval import simple_evaluate
    simple_evaluate(LmEvalAdapter(eval_model), tasks=["hellaswag", "lambada_openai"], bootstrap_iters=1000)

It also answers the requests of `own_tasks`: gaps, reconstruction, and texts that a model judges. It needs the package
lm-eval; nothing that every user imports needs this module.
"""

import collections
import dataclasses
import itertools
import math
import os
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tqdm import tqdm

from dlm_jax.errors import ConfigError, DataError
from dlm_jax.evaluation.eval_model import EvalModel, GenerationRequest, Pair, fit_context, make_pair, score_pairs
from dlm_jax.evaluation.scoring import reconstruct

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
_CHUNK = 64  # questions that are answered before they are stored


class _Question(NamedTuple):
    """The requests of one document: the options of a choice, or a single request.

    Attributes:
      task, document, repetition: lm-eval's name and number, and the number of earlier requests that were the same.
      noise: the item number that determines random numbers, in 0 .. 2**32 - 1.
      places: indices of the requests in the call.
    """

    task: str
    document: int
    repetition: int
    noise: int
    places: list[int]

    def keys(self, kind: str) -> list[str]:
        """Returns a name of each request, the same in every run."""
        return [f"{kind} {self.task} {self.document} {self.repetition} {n}" for n in range(len(self.places))]


class _Settings(NamedTuple):
    """The settings in `generation_kwargs`; `length` in tokens."""

    until: tuple[str, ...]
    length: int
    temperature: float


@dataclasses.dataclass
class Cost:
    """What the answers of a task cost: seconds, compilation included, generated tokens, and forward passes for them."""

    seconds: float = 0.0
    tokens: int = 0
    passes: int = 0


class LmEvalAdapter(LM):
    """Implements lm-eval's `LM` with an `EvalModel`.

    Log-likelihoods are the negative scores, in nats; for a diffusion model they are lower bounds. Context and
    continuation are tokenized together (`eval_model.make_pair`). Noise depends on the task's name and
    the document's number alone, so all options of a question get the same. Repetitions of a request (`repeats: N`) get
    noise of their own.

    Attributes:
      shortened: (requested tokens, generated tokens) of each task whose texts are shorter than it asks for.
      costs: by task.
      halves: by task, document and option: the log-likelihood from each half of the passes (`eval_model.Score`).
    """

    def __init__(self, eval_model: EvalModel, *, tokenizer: "PreTrainedTokenizerBase | None" = None,
                 num_steps: int | None = None, max_gen_toks: int = 256, is_greedy: bool | None = None,
                 judge: EvalModel | None = None, seed: int = 0, known: Mapping[str, Any] | None = None,
                 store: Callable[[dict[str, Any]], None] = lambda answers: None, progress: bool = False):
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
          judge: scores open-ended texts.
          seed: of the masks for reconstruction; scores and texts have the seed of the `eval_model`.
          known: JSON answers of a stopped run, by the keys that `store` got.
          store: called with new answers, again and again.
          progress: whether to show a bar on a terminal.

        Raises:
          ConfigError: a number is less than 1.
        """
        super().__init__()
        for name, value in (("num_steps", num_steps), ("max_gen_toks", max_gen_toks)):
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        self.eval_model, self.tokenizer, self.shortened = eval_model, tokenizer, {}
        self.costs: dict[str, Cost] = collections.defaultdict(Cost)
        self.halves: dict[tuple[str, int, int], tuple[float, float]] = {}
        self._num_steps, self._max_gen_toks, self._is_greedy = num_steps, max_gen_toks, is_greedy
        self._judge, self._seed, self._known, self._store = judge, seed, known or {}, store
        self._progress = progress
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

        def answer(questions: Sequence[_Question]) -> list[dict[str, Any]]:
            pairs, checked = [], []
            for question in questions:
                is_checked = self._is_greedy or (self._is_greedy is None and len(question.places) == 1)
                for option, place in enumerate(question.places):
                    context, continuation = requests[place].args[:2]
                    pairs.append(make_pair(self.eval_model, context, continuation, question.noise, option,
                                           f"{question.task}, item {question.document}, option {option}"))
                    checked.append(bool(is_checked))
            scores, is_greedy = score_pairs(self.eval_model, pairs, np.array(checked),
                                            f"the task {questions[0].task}")
            return [{"halves": both, "is_greedy": found}
                    for both, found in zip((-halves_of(scores)).tolist(), is_greedy.tolist(), strict=True)]

        answers = self._run("loglikelihood", requests, answer)
        return [(math.fsum(answer["halves"]) / 2, answer["is_greedy"]) for answer in answers]

    def loglikelihood_rolling(self, requests: "Sequence[Instance]") -> list[float]:
        """Returns the log-probability of each (text,) in nats, or a bound.

        A text longer than a row is split into windows. Every token is scored once; windows after the first have one
        token of context, and the last has as many as fit.
        """
        self._check("score", requests)

        def answer(questions: Sequence[_Question]) -> list[dict[str, Any]]:
            pairs, owner = [], []
            places = [(question, place) for question in questions for place in question.places]
            for number, (question, place) in enumerate(places):
                tokens = self.eval_model.encode(requests[place].args[0])
                for window, (context, continuation) in enumerate(self._windows(tokens)):
                    pairs.append(Pair(context, continuation, _noise(question.noise, window), window, window == 0))
                    owner.append(number)
            found = np.zeros((len(places), 2))
            if pairs:
                np.add.at(found, owner, halves_of(self.eval_model.score(pairs)))
            return [{"halves": both} for both in (-found).tolist()]

        answers = self._run("loglikelihood_rolling", requests, answer)
        return [math.fsum(answer["halves"]) / 2 for answer in answers]

    def generate_until(self, requests: "Sequence[Instance]") -> list[str]:
        """Returns the text generated after each (context, generation_kwargs), up to the first of `until`.

        `do_sample`, `temperature` and the number of tokens are respected. A prompt that is too long is cut from the
        left.

        Raises:
          ConfigError: the model has no `generate`, or generation_kwargs contain an unsupported setting.
        """
        self._check("generate", requests)
        settings = [self._settings(request) for request in requests]

        def answer(questions: Sequence[_Question]) -> list[str]:
            places = [(question, place) for question in questions for place in question.places]
            asked = [GenerationRequest(requests[place].args[0], "", range(1, settings[place].length + 1)[-1:],
                                       question.noise) for question, place in places]
            texts = self._generated([(request, settings[place].temperature)
                                     for request, (_, place) in zip(asked, places, strict=True)])
            return [_truncate(text, settings[place].until)
                    for text, (_, place) in zip(texts, places, strict=True)]

        return self._run("generate_until", requests, answer)

    def infill(self, requests: "Sequence[Instance]") -> list[dict[str, Any]]:
        """Returns {"text", "left_to_right"} for each (before, after, lengths of the gap in tokens).

        A gap has at most half of the model's row. A model that generates from left to right sees nothing after it, and
        generates as many tokens as the longest has.
        """
        self._check("generate", requests)
        left_to_right = self.eval_model.autoregressive

        def ask(before: str, after: str, lengths: range, noise: int) -> GenerationRequest:
            if self.max_length is not None:
                most = self.max_length // 2
                lengths = range(min(lengths.start, most), min(lengths[-1], most) + 1, lengths.step)
            return GenerationRequest(before, "" if left_to_right else after,
                                     lengths[-1:] if left_to_right else lengths, noise)

        def answer(questions: Sequence[_Question]) -> list[dict[str, Any]]:
            texts = self._generated([(ask(*requests[place].args, question.noise), 0.0)
                                     for question in questions for place in question.places])
            return [{"text": text, "left_to_right": left_to_right} for text in texts]

        return self._run("infill", requests, answer)

    def reconstruct(self, requests: "Sequence[Instance]") -> list[dict[str, float]]:
        """Returns {"10% masked": share of masked tokens that are predicted right, ...} for each (text,)."""
        self._check("masked_accuracy", requests)

        def answer(questions: Sequence[_Question]) -> list[dict[str, float]]:
            most = None if self.max_length is None else self.max_length - 1
            pairs = [Pair((), tuple(self.eval_model.encode(requests[place].args[0])[:most]), question.noise)
                     for question in questions for place in question.places]
            return reconstruct(self.eval_model.masked_accuracy, pairs, self._seed)

        return self._run("reconstruct", requests, answer)

    def generate_and_judge(self, requests: "Sequence[Instance]") -> list[dict[str, Any]]:
        """Returns {"text", "nats", "tokens"} for each (prompt, {"length", "temperature"}); nats are the judge's.

        Raises:
          ConfigError: there is no judge that scores.
        """
        self._check("generate", requests)
        if self._judge is None or self._judge.score is None:
            raise ConfigError(f"the task {requests[0].task_name} needs a model that judges generated texts; give the "
                              "LmEvalAdapter a judge that scores")

        def answer(questions: Sequence[_Question]) -> list[dict[str, Any]]:
            asked = [(*requests[place].args, question) for question in questions for place in question.places]
            length = self._shortened(asked[0][1]["length"], questions[0].task)
            texts = self._generated([(GenerationRequest(prompt, "", range(length, length + 1), question.noise),
                                      options["temperature"]) for prompt, options, question in asked])
            pairs, owner = [], []
            for number, (text, (prompt, _, question)) in enumerate(zip(texts, asked, strict=True)):
                found = _judged_pairs(self._judge, prompt, text, question)
                pairs += found
                owner += [number] * len(found)
            nats, tokens = np.zeros(len(texts)), np.zeros(len(texts), int)
            if pairs:
                np.add.at(nats, owner, halves_of(self._judge.score(pairs)).mean(axis=1))
                np.add.at(tokens, owner, [len(pair.continuation) for pair in pairs])
            return [{"text": text, "nats": cost, "tokens": count}
                    for text, cost, count in zip(texts, nats.tolist(), tokens.tolist(), strict=True)]

        return self._run("generate_and_judge", requests, answer)

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

    def _run(self, kind: str, requests: "Sequence[Instance]", answer: Callable[[Sequence[_Question]], list]) -> list:
        """Returns the answers of all requests: known ones, and those of `answer` for chunks of a task's questions."""
        answers: list[Any] = [None] * len(requests)
        with tqdm(total=len(requests), desc=f"{kind}, {self.eval_model.name}", unit="request",
                  disable=None if self._progress else True) as bar:
            for task, group in itertools.groupby(_questions(requests), key=lambda question: question.task):
                for questions in _chunks(group):
                    missing = [one for one in questions if not all(key in self._known for key in one.keys(kind))]
                    found = dict(zip([key for one in missing for key in one.keys(kind)],
                                     self._timed(task, answer, missing), strict=True))
                    self._store(found)
                    for one in questions:
                        for option, (place, key) in enumerate(zip(one.places, one.keys(kind), strict=True)):
                            answers[place] = found.get(key, self._known.get(key))
                            if "loglikelihood" in kind:
                                self.halves[task, one.document, option] = tuple(answers[place]["halves"])
                    bar.update(sum(len(one.places) for one in questions))
        return answers

    def _timed(self, task: str, answer: Callable[[Sequence[_Question]], list], questions: Sequence[_Question]) -> list:
        if not questions:
            return []
        cost, stats, started = self.costs[task], self.eval_model.stats, time.perf_counter()
        before = (stats.tokens, stats.passes) if stats else (0, 0)
        found = answer(questions)
        cost.seconds += time.perf_counter() - started
        if stats:
            cost.tokens, cost.passes = (cost.tokens + stats.tokens - before[0],
                                        cost.passes + stats.passes - before[1])
        return found

    def _generated(self, requests: Sequence[tuple[GenerationRequest, float]]) -> list[str]:
        """Returns the text of each (request, temperature)."""
        texts = [""] * len(requests)
        for temperature in sorted({temperature for _, temperature in requests}):
            members = [n for n, (_, asked) in enumerate(requests) if asked == temperature]
            found = self.eval_model.generate([requests[n][0] for n in members], temperature=temperature,
                                             num_steps=self._num_steps)
            for n, text in zip(members, found, strict=True):
                texts[n] = text
        return texts

    def _settings(self, request: "Instance") -> _Settings:
        settings = _settings(request.args[1], self._max_gen_toks, str(request.task_name))
        return settings._replace(length=self._shortened(settings.length, str(request.task_name)))

    def _shortened(self, length: int, task: str) -> int:
        """Returns the number of tokens to generate: at most half of a row, so that there is room for a prompt."""
        if self.max_length is None or length <= self.max_length // 2:
            return length
        self.shortened[task] = length, self.max_length // 2
        return self.max_length // 2


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
        yield _Question(str(task), document if isinstance(document, int) else number, repetition,
                        _noise(task, document, repetition), places)


def _judged_pairs(judge: EvalModel, prompt: str, text: str, question: _Question) -> list[Pair]:
    """Returns the pairs that score a text after its prompt, each with at most half of the judge's row to score."""
    if not text:
        return []
    where = f"{question.task}, item {question.document}"
    if judge.max_length is None:
        return [make_pair(judge, prompt, text, question.noise, 0, where)]
    whole = make_pair(dataclasses.replace(judge, max_length=None), prompt, text, question.noise, 0, where)
    size, tokens, start = max(judge.max_length // 2, 1), whole.context + whole.continuation, len(whole.context)
    return [Pair(fit_context(tokens[:at], tokens[at : at + size], judge, where), tokens[at : at + size], question.noise,
                 window) for window, at in enumerate(range(start, len(tokens), size))]


def _chunks(questions: Iterable[_Question]) -> Iterator[list[_Question]]:
    questions = iter(questions)
    while chunk := list(itertools.islice(questions, _CHUNK)):
        yield chunk


def halves_of(scores: Sequence[float] | np.ndarray) -> np.ndarray:
    """Returns scores as float64 [pairs, 2], of each half of the passes; exact ones twice."""
    scores = np.asarray(scores, np.float64)
    return scores if scores.ndim == 2 else np.stack([scores, scores], axis=1)


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
