"""OpenAI's protocol: what a request may say, and the JSON of answers, chunks and errors.

A request is refused, not guessed at: unknown and repeated fields, values of another type, and fields that are not
supported unless they hold the value that changes nothing.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from dlm_jax import __version__
from dlm_jax.errors import DLMError, did_you_mean
from dlm_jax.sampling.text import BROKEN

MAX_SEED = (1 << 32) - 1
MAX_CHOICES, MAX_PROMPTS, MAX_STOPS = 16, 64, 16
_PROMPT_TYPES = "prompt must be a text, a list of texts, a list of token ids, or a list of such lists"
# Fields of OpenAI's that are not supported, and the values, beside null, with which they change nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (), "best_of": (1,), "frequency_penalty": (0,), "function_call": ("none",), "functions": ([],),
    "logit_bias": ({},), "metadata": ({},), "modalities": (["text"],), "moderation": (), "parallel_tool_calls":
    (True, False), "prediction": (), "presence_penalty": (0,), "prompt_cache_key": (), "prompt_cache_retention": (),
    "reasoning_effort": ("none",), "response_format": ({"type": "text"},), "safety_identifier": (),
    "service_tier": ("auto", "default"), "store": (False,), "tool_choice": ("none", "auto"), "tools": ([],),
    "verbosity": (), "web_search_options": ()}


class RequestError(DLMError):
    """A request that is refused or has failed, with the status and the fields of OpenAI's error."""

    def __init__(self, message: str, status: int = 400, *, param: str | None = None, code: str | None = None,
                 headers: Mapping[str, str] | None = None):
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The error in OpenAI's JSON."""
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def _read_prompt(value: Any) -> list[str] | list[list[int]]:
    """Returns the prompts of a request, each a text or a list of token ids."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise ValueError(_PROMPT_TYPES)
    if not value:
        raise ValueError("prompt is an empty list; give at least one text")
    if all(type(item) is int for item in value):
        value = [value]
    if all(isinstance(item, str) for item in value):
        return value
    if all(isinstance(item, list) and all(type(token) is int for token in item) for item in value):
        if not all(value):
            raise ValueError("a prompt of token ids has at least one")
        return value
    raise ValueError(_PROMPT_TYPES)


def _read_stop(value: Any) -> tuple[str, ...]:
    """Returns the stop strings of a request."""
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise ValueError("stop must be a text or a list of texts")
    if not all(stops):
        raise ValueError("an empty text stops everything; omit it from stop")
    if len(stops) > MAX_STOPS:
        raise ValueError(f"at most {MAX_STOPS} stop strings, got {len(stops)}")
    return tuple(stops)


def _read_content(value: Any) -> str:
    """Returns the text of a message, whose parts are joined by line breaks."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise ValueError("the content of a message must be a text, or a list of parts of the type text")
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in value]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("only parts of the type text can be read; remove the others from this content")
    return "\n".join(texts)


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(_Model):
    """What a stream has beside its chunks."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class Message(_Model):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str, BeforeValidator(_read_content)]
    name: str | None = None


class SamplingRequest(_Model):
    """What both kinds of requests have. The fields from `policy` on are those of `sampling.SamplerConfig`."""

    model: str
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stop: Annotated[tuple[str, ...], BeforeValidator(_read_stop)] = ()
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stream_steps: bool | None = None
    user: str | None = None
    policy: str | None = None
    num_steps: int | None = None
    step_schedule: str | None = None
    block_length: int | None = None
    threshold: float | None = None
    remask: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    eos_penalty: float | Literal["inf"] | None = None
    cfg_scale: float | None = None
    cache: str | None = None
    cache_refresh_interval: int | None = None
    drafter: Literal["none", "ngram", "self", "default"] | None = None
    num_drafts: int | None = None
    draft_threshold: float | None = None
    draft_vocab_size: int | None = None

    @model_validator(mode="after")
    def _check_stream(self) -> Self:
        if not self.stream and (self.stream_options is not None or self.stream_steps):
            name = "stream_steps" if self.stream_steps else "stream_options"
            raise ValueError(f"{name} is for a stream; set stream to true, or omit it")
        return self

    is_chat: ClassVar[bool] = False

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class CompletionRequest(SamplingRequest):
    """`/v1/completions`: a text to continue, or with `suffix` or `infill` one with gaps to fill."""

    prompt: Annotated[Any, BeforeValidator(_read_prompt)]
    suffix: str | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: bool | None = None
    infill: bool | None = None
    gap_length: Annotated[int, Field(ge=1)] | None = None

    @property
    def shows_log_probs(self) -> bool:
        return self.logprobs is not None  # 0 asks for those of the text alone

    @property
    def num_top(self) -> int:
        return self.logprobs or 0

    @model_validator(mode="after")
    def _check_infill(self) -> Self:
        if not self.infill:
            if self.gap_length is not None:
                raise ValueError("gap_length is for a text with gaps; set infill to true, or omit it")
            return self
        for name in ("suffix", "max_tokens", "echo", "stop"):
            if getattr(self, name):
                raise ValueError(f"{name} does not go with infill, which fills the gaps of the prompt; omit it")
        if not all(isinstance(prompt, str) for prompt in self.prompt):
            raise ValueError("infill needs a prompt that is a text with gaps, such as 'The <mask:3> sat'")
        return self


class ChatRequest(SamplingRequest):
    """`/v1/chat/completions`: a conversation to answer."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    is_chat: ClassVar[bool] = True

    @property
    def shows_log_probs(self) -> bool:
        return bool(self.logprobs)

    @property
    def num_top(self) -> int:
        return self.top_logprobs or 0

    @model_validator(mode="after")
    def _check_chat(self) -> Self:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens and max_completion_tokens say the same; omit one of them")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs; set it to true, or omit top_logprobs")
        return self


Request = TypeVar("Request", bound=SamplingRequest)


def parse_request(body: bytes, kind: type[Request]) -> Request:
    """Returns the request of a body in JSON.

    Raises:
      RequestError: the body is not UTF-8, not JSON or not a request of this kind.
    """
    fields = _parse_json(body)
    for name in NEUTRAL.keys() & fields.keys():
        value = fields.pop(name)
        if value is not None and value not in NEUTRAL[name]:
            raise RequestError(f"{name} is not supported by this server; omit it", param=name)
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise _sentence(error.errors(include_url=False)[0], list(kind.model_fields)) from error


def _parse_json(body: bytes) -> dict[str, Any]:
    """Returns the object of a body, without duplicate keys, NaN and lone surrogates."""
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise RequestError(f"the field {twice[:80]!r} is there twice; remove one", param=twice[:80])
        return found

    def refuse(name: str) -> None:
        raise RequestError(f"{name} is not JSON; write a number")

    try:
        found = json.loads(body.decode(), object_pairs_hook=unique, parse_constant=refuse)
        json.dumps(found, ensure_ascii=False).encode()
    except UnicodeError as error:
        raise RequestError("the body is not text in UTF-8") from error
    except RecursionError as error:
        raise RequestError("the body is nested too deeply") from error
    except ValueError as error:
        raise RequestError(f"the body is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise RequestError("the body must be a JSON object, such as {\"model\": ..., \"prompt\": ...}")
    return found


def _sentence(problem: Mapping[str, Any], known: Sequence[str]) -> RequestError:
    """Returns the first problem that pydantic found, in one sentence."""
    path = [str(part)[:80] for part in problem["loc"]]
    kind, name = problem["type"], ".".join(path)
    if kind == "extra_forbidden":
        suggestion = did_you_mean(path[-1], known) if len(path) == 1 else ""
        return RequestError(f"there is no field {name!r}{suggestion}", param=name)
    if kind == "missing":
        return RequestError(f"the field {name!r} is missing", param=name)
    message = problem["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    return RequestError(message if kind == "value_error" else f"{name}: {message}", param=name or None)


# Answers.


class TokenLogProb(NamedTuple):
    """A token with its log-probability: `text` is what it adds to the text, at `offset` in characters.

    Attributes:
      log_prob: None for a prompt's first token, which nothing predicts.
      top: the most likely tokens at this place with their log-probabilities; None where there are none to give.
    """

    text: str
    log_prob: float | None
    top: tuple[tuple[str, float], ...] | None
    offset: int


class Usage(NamedTuple):
    """What a request has used."""

    prompt_tokens: int
    completion_tokens: int
    forward_passes: int

    def body(self) -> dict[str, Any]:
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.completion_tokens,
                "total_tokens": self.prompt_tokens + self.completion_tokens, "forward_passes": self.forward_passes,
                "tokens_per_pass": round(self.completion_tokens / max(self.forward_passes, 1), 4)}


class Answer(NamedTuple):
    """What all chunks of an answer share, or its one body."""

    id: str
    created: int
    model: str
    seed: int
    is_chat: bool

    def body(self, choices: list[dict[str, Any]], *, stream: bool, **fields: Any) -> dict[str, Any]:
        kind = ("chat.completion.chunk" if stream else "chat.completion") if self.is_chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices,
                "system_fingerprint": f"dlm_jax-{__version__}", "seed": self.seed, **fields}

    def choice(self, index: int, text: str, finish_reason: str | None, log_probs: Sequence[TokenLogProb] | None,
               **fields: Any) -> dict[str, Any]:
        """Returns a complete choice."""
        text_of = {"message": {"role": "assistant", "content": text, "refusal": None}} if self.is_chat else {
            "text": text}
        return {"index": index, **text_of, "logprobs": self._log_probs(log_probs), "finish_reason": finish_reason,
                **fields}

    def delta(self, index: int, text: str, finish_reason: str | None, log_probs: Sequence[TokenLogProb] | None,
              is_first: bool = False) -> dict[str, Any]:
        """Returns what a chunk adds to a choice."""
        if not self.is_chat:
            return self.choice(index, text, finish_reason, log_probs)
        delta = {"role": "assistant", "content": text} if is_first else {"content": text} if text else {}
        return {"index": index, "delta": delta, "logprobs": self._log_probs(log_probs), "finish_reason": finish_reason}

    def _log_probs(self, tokens: Sequence[TokenLogProb] | None) -> dict[str, Any] | None:
        if tokens is None:
            return None
        return chat_log_probs(tokens) if self.is_chat else completion_log_probs(tokens)


def completion_log_probs(tokens: Sequence[TokenLogProb]) -> dict[str, Any]:
    """Returns log-probabilities in the format of completions.

    Tokens of the same text have one entry in `top_logprobs`, the highest.
    """
    def top(token: TokenLogProb) -> dict[str, float] | None:
        if token.top is None:
            return None
        found: dict[str, float] = {}
        for text, log_prob in token.top:
            found[text] = max(log_prob, found.get(text, log_prob))
        return found

    return {"tokens": [token.text for token in tokens], "token_logprobs": [token.log_prob for token in tokens],
            "top_logprobs": [top(token) for token in tokens], "text_offset": [token.offset for token in tokens]}


def chat_log_probs(tokens: Sequence[TokenLogProb]) -> dict[str, Any]:
    """Returns log-probabilities in the format of chats; a token that is a fraction of a character has no bytes."""
    def entry(text: str, log_prob: float | None) -> dict[str, Any]:
        return {"token": text, "logprob": log_prob, "bytes": None if BROKEN in text else list(text.encode())}

    return {"content": [{**entry(token.text, token.log_prob), "top_logprobs": [entry(*one) for one in token.top or ()]}
                        for token in tokens], "refusal": None}
