"""From a request to rows for the engine: the same rows, settings and random numbers as `DiffusionLM` gives its own.

`generate` is a prompt and a gap, `infill` a text with gaps, `respond` a conversation and a gap. What cannot be served
is refused here, before anything is as long as a request says.
"""

import contextlib
import dataclasses
import functools
import math
import secrets
from collections.abc import Sequence
from typing import Any, Self

from dlm_jax.checkpoints import Pretrained
from dlm_jax.data.prompts import PromptFormat
from dlm_jax.data.tokenization import tokenize_prompt
from dlm_jax.errors import ConfigError, DLMError
from dlm_jax.pipeline import DiffusionLM
from dlm_jax.sampling import BUILT_IN_DRAFTERS, GAP, POLICIES, SamplerConfig, SamplingSpec, resolve_settings
from dlm_jax.sampling.gap_length import infer_gap_lengths
from dlm_jax.sampling.text import Segment, TokenTexts, encode, split_gaps
from dlm_jax.serving.protocol import (
    MAX_PROMPTS,
    MAX_SEED,
    ChatRequest,
    CompletionRequest,
    RequestError,
    SamplingRequest,
)
from dlm_jax.serving.queue import Job
from dlm_jax.serving.text import TextFormat, final_groups

COMPLETION_TOKENS = 16  # where a completion names no max_tokens, as in OpenAI's API
CHAT_TOKENS = 128  # where a chat names none, as in `dlm chat`
GAP_TOKENS = 16  # in a plain <mask>, as in `dlm sample`
_WARM_TOKENS = (16, 64)  # of the completions that are compiled at the start: the API's default, and the page's
MAX_GAP_LENGTHS = 64  # lengths that are tried for the gaps of a request whose length is not given
_SAMPLER_FIELDS = tuple(field.name for field in dataclasses.fields(SamplerConfig))


@dataclasses.dataclass(frozen=True)
class ServedModel:
    """A model, with what every request needs of it.

    Attributes:
      name: as requests name it.
      drafter: what `drafter="default"` means: a built-in drafter or the place of a trained one.
      max_tokens: the most new tokens per choice; None: as many as the model takes.
      is_parent: whether it is served to compare another with.
      prompt_format: None: it answers no conversations.
    """

    name: str
    lm: DiffusionLM
    texts: TokenTexts
    drafter: str = "none"
    max_tokens: int | None = None
    is_parent: bool = False
    prompt_format: PromptFormat | None = None

    @classmethod
    def make(cls, name: str, lm: DiffusionLM, **settings: Any) -> Self:
        """Returns the model, with the prompt format of its fine-tuning if it has one."""
        prompt_format = None
        with contextlib.suppress(DLMError):  # it records none, and its tokenizer has no chat template that can be used
            prompt_format = lm.prompt_format()
        return cls(name, lm, TokenTexts(lm.tokenizer), prompt_format=prompt_format, **settings)

    @property
    def pretrained(self) -> Pretrained:
        return self.lm.pretrained

    @property
    def max_length(self) -> int:
        return self.lm.config.max_length

    @functools.cached_property
    def max_characters(self) -> int:
        """More than any row has, so that a longer text is refused without being tokenized."""
        return self.max_length * max(map(len, self.lm.tokenizer.get_vocab()))

    def encode(self, text: Sequence[Segment]) -> tuple[list[int], list[range]]:
        """Returns the tokens of a text with gaps, and the gaps' positions, as `sampling.text.encode` does."""
        return encode(self.lm.tokenizer, text, self.pretrained.start_token_id)

    @property
    def has_mask_token(self) -> bool:
        return self.pretrained.diffusion.mask_token_id is not None

    @property
    def default_sampling(self) -> dict[str, Any]:
        """As `DiffusionLM.default_sampling`; without a mask token there is one policy."""
        return self.lm.default_sampling if self.has_mask_token else {"policy": "autoregressive"}

    @property
    def policies(self) -> list[str]:
        able = {"autoregressive": self.pretrained.diffusion.shift}
        return [policy for policy in POLICIES if able.get(policy, self.has_mask_token)]

    def card(self, created: int) -> dict[str, Any]:
        """Returns the model's entry in the list of models."""
        blocks = self.pretrained.diffusion.blocks
        abilities = {
            "max_length": self.max_length, "policies": self.policies,
            "default_policy": self.default_sampling["policy"], "default_sampling": self.default_sampling,
            "block_length": None if blocks is None else blocks.size,
            "has_chat_template": self.prompt_format is not None, "has_mask_token": self.has_mask_token,
            "drafter": self.drafter if self.drafter in BUILT_IN_DRAFTERS else "trained",  # not where it is stored
            "parent": self.is_parent}
        return {"id": self.name, "object": "model", "created": created, "owned_by": "dlm_jax", "dlm": abilities}


@dataclasses.dataclass(frozen=True)
class Choice:
    """One choice of an answer: a row to fill, and how its text is read.

    Attributes:
      tokens: GAP where a token is to be sampled; none where the request asks for 0 tokens.
      prompt: the tokens before the first gap; for an echo, without the start token that its text does not have.
      echo: the prompt's text, if it is part of the answer.
    """

    index: int
    tokens: list[int]
    text_format: TextFormat
    prompt: list[int]
    echo: str = ""

    @property
    def given(self) -> list[int]:
        return [token for token in self.tokens if token != GAP]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a request asks of the engine: choices, and how all of them are sampled.

    Attributes:
      per_prompt: the number of choices of each prompt; they follow each other.
    """

    choices: list[Choice]
    spec: SamplingSpec
    seed: int
    per_prompt: int = 1

    @property
    def prompts(self) -> list[Choice]:
        """The first choice of each prompt."""
        return self.choices[:: self.per_prompt]

    @property
    def prompt_tokens(self) -> int:
        return sum(len(choice.given) for choice in self.prompts)


def plan_completion(model: ServedModel, request: CompletionRequest) -> Plan:
    """Returns the choices of a completion: choice p * n + j is sample j of prompt p.

    Gaps of unknown length are not inferred here: see `unknown_lengths`.

    Raises:
      RequestError: the request does not suit the model.
      DLMError: a setting is out of range, or the text cannot be encoded.
    """
    prompts, stop_at_end = request.prompt, not request.infill and request.suffix is None
    _check_choices(len(prompts), request)
    for text in (*prompts, request.suffix or ""):
        _check_size(model, text)
    end = model.pretrained.eos_token_id
    spec = _spec(model, request, () if end is None else (end,), stop_at_end=stop_at_end)
    if request.infill:
        texts = [_split(model, prompt, request.gap_length or GAP_TOKENS) for prompt in prompts]
    else:
        new = _new_tokens(model, request.max_tokens, COMPLETION_TOKENS)
        gap = [new] if new else []
        texts = [[prompt if isinstance(prompt, str) else "", *gap, *([request.suffix] if request.suffix else [])]
                 for prompt in prompts]
        if request.suffix and not new:
            raise RequestError("a suffix needs max_tokens of at least 1, the length of the gap before it",
                               param="max_tokens")
    encoded = [_encode(model, prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
    choices = []
    for prompt, text, (tokens, gaps) in zip(prompts, texts, encoded, strict=True):
        _check_length(model, tokens)
        if spec.blocks is not None and gaps and any(token != GAP for token in tokens[gaps[0].start :]):
            raise RequestError(f"the model {model.name!r} writes block by block and does not see text after a gap; "
                               "continue a text with it, or choose a model trained on entire rows", param="prompt")
        echo = "" if not request.echo else prompt if isinstance(prompt, str) else model.texts.decode(prompt)
        own = tokens[: gaps[0].start] if gaps else tokens
        if request.echo and isinstance(prompt, str):  # without a start token that the text does not have
            given = text[0].removesuffix(" ") if len(text) > 1 else text[0]  # as `encode` reads it
            own = own[len(own) - len(tokenize_prompt(model.lm.tokenizer, given)) :]
        text_format = TextFormat(
            text, gaps, spec.eos_token_ids if stop_at_end else (), "length" if stop_at_end else "stop", request.stop,
            shows_given=bool(request.infill), shows_end=True, offset=len(echo), needed=final_groups(tokens, spec))
        choices += [Choice(len(choices) + j, tokens, text_format, own, echo) for j in range(request.num_choices)]
    return Plan(choices, spec, _seed(request), request.num_choices)


def plan_chat(model: ServedModel, request: ChatRequest) -> Plan:
    """Returns the choices of a chat; errors as of `plan_completion`."""
    prompt_format = model.prompt_format
    if prompt_format is None:
        raise RequestError(f"the model {model.name!r} answers no conversations: it records no prompt format, and its "
                           "tokenizer has no chat template; use /v1/completions", param="model")
    _check_choices(1, request)
    _check_size(model, "".join(message.content for message in request.messages))
    spec = _spec(model, request, prompt_format.end_token_ids, stop_at_end=True)
    messages = [{"role": "system" if message.role == "developer" else message.role, "content": message.content}
                for message in request.messages]
    if prompt_format.config.format != "messages":
        if len(messages) > 1 or messages[0]["role"] != "user":
            raise RequestError(f"the model {model.name!r} was fine-tuned on single questions "
                               f"({prompt_format.config.format}); send one message of the role user", param="messages")
        messages = messages[0]["content"]
    prompt = prompt_format.encode_prompt(messages)
    asked = request.max_completion_tokens if request.max_tokens is None else request.max_tokens
    room = model.max_length - len(prompt)
    new = _new_tokens(model, asked, max(min(CHAT_TOKENS, room), 1))
    _check_length(model, tokens := [*prompt, *[GAP] * new])
    text_format = TextFormat(["", new], [range(len(prompt), len(tokens))], spec.eos_token_ids, "length", request.stop,
                             is_response=True, end_text=prompt_format.end_text, needed=final_groups(tokens, spec))
    choices = [Choice(index, tokens, text_format, prompt) for index in range(request.num_choices)]
    return Plan(choices, spec, _seed(request), request.num_choices)


def unknown_lengths(plan: Plan) -> bool:
    """Returns whether a gap's length is not given, so that `infer_lengths` must be called."""
    return any(isinstance(segment, range) for choice in plan.prompts for segment in choice.text_format.segments)


def infer_lengths(model: ServedModel, plan: Plan) -> Plan:
    """Returns the plan with every gap's length, as `DiffusionLM.infill` infers it; runs the model."""
    lm = model.lm
    texts = infer_gap_lengths(lm.model, [choice.text_format.segments for choice in plan.prompts], model.encode,
                              diffusion=lm.diffusion, mesh=lm.mesh)
    choices = []
    for number, choice in enumerate(plan.choices):
        text = texts[number // plan.per_prompt]
        tokens, gaps = model.encode(text)
        text_format = dataclasses.replace(choice.text_format, segments=text, gaps=gaps,
                                          needed=final_groups(tokens, plan.spec))
        choices.append(dataclasses.replace(choice, tokens=tokens, text_format=text_format))
    return dataclasses.replace(plan, choices=choices)


def warm_up_jobs(model: ServedModel) -> list[Job]:
    """Returns rows like those of requests that name no settings: completions, infills and chats of usual lengths.

    What is not like them is compiled when it first comes.
    """
    def job(given: int, new: int, **changes: Any) -> Job:
        given = min(given, model.max_length // 2)
        new = min(new, model.max_length - given)
        request = CompletionRequest(model=model.name, prompt=[[model.pretrained.start_token_id] * given],
                                    max_tokens=min(new, model.max_tokens or new))
        plan = plan_completion(model, request)
        return Job(model=model.name, row=plan.choices[0].tokens, spec=dataclasses.replace(plan.spec, **changes),
                   on_update=lambda update: None)

    jobs = [job(16, new) for new in _WARM_TOKENS]
    if model.has_mask_token and model.pretrained.diffusion.blocks is None:
        jobs += [job(16, new, stop_at_eos=False) for new in _WARM_TOKENS]
    if model.prompt_format is not None:
        jobs.append(job(48, CHAT_TOKENS, eos_token_ids=model.prompt_format.end_token_ids, stop_at_eos=True))
    return jobs


def _spec(model: ServedModel, request: SamplingRequest, ends: tuple[int, ...], *,
          stop_at_end: bool) -> SamplingSpec:
    config = sampler_settings(model, request)
    if config.policy != "autoregressive" and not model.has_mask_token:
        raise RequestError(f"the model {model.name!r} has no mask token, which the policy {config.policy} needs; "
                           "choose autoregressive", param="policy")
    if config.policy == "autoregressive" and (getattr(request, "suffix", None) or getattr(request, "infill", None)):
        raise RequestError("autoregressive decoding does not see text after a gap; choose another policy, or a model "
                           "that has one", param="policy")
    return SamplingSpec(config, model.pretrained.diffusion, ends, stop_at_end and bool(ends))


def sampler_settings(model: ServedModel, request: SamplingRequest) -> SamplerConfig:
    """Returns the settings of a request, with the model's own and the server's drafter where it names none."""
    given = {name: value for name in _SAMPLER_FIELDS if (value := getattr(request, name)) is not None}
    if given.get("eos_penalty") == "inf":
        given["eos_penalty"] = math.inf
    if given.get("drafter") == "default":
        given["drafter"] = model.drafter
    try:
        return resolve_settings(given, {**model.default_sampling, "drafter": model.drafter})
    except ConfigError as error:
        named = [name for name in _SAMPLER_FIELDS if name in str(error).split()]
        raise RequestError(str(error), param=named[0] if named else None) from error


def _seed(request: SamplingRequest) -> int:
    return secrets.randbelow(MAX_SEED + 1) if request.seed is None else request.seed


def _check_choices(num_prompts: int, request: SamplingRequest) -> None:
    if num_prompts * request.num_choices > MAX_PROMPTS:
        raise RequestError(f"{num_prompts} prompts with {request.num_choices} samples each are more than {MAX_PROMPTS} "
                           "choices, the most in a request; send several", param="prompt" if num_prompts > 1 else "n")


def _new_tokens(model: ServedModel, asked: int | None, default: int) -> int:
    """Returns the number of new tokens; refuses one that no row of the model holds."""
    most = model.max_length if model.max_tokens is None else min(model.max_tokens, model.max_length)
    if asked is not None and asked > most:
        raise RequestError(f"max_tokens is {asked}, and this server gives at most {most} with the model "
                           f"{model.name!r}", param="max_tokens")
    return min(default, most) if asked is None else asked


def _check_size(model: ServedModel, prompt: str | list[int]) -> None:
    most, unit = (model.max_characters, "characters") if isinstance(prompt, str) else (model.max_length, "token ids")
    if len(prompt) > most:
        raise RequestError(f"a text of {len(prompt):,} {unit}, and a row of the model {model.name!r} holds at most "
                           f"{most:,}; shorten it", param="prompt", code="context_length_exceeded")


def _check_length(model: ServedModel, tokens: Sequence[int]) -> None:
    if len(tokens) > model.max_length:
        given = sum(token != GAP for token in tokens)
        raise RequestError(f"{given} given tokens and {len(tokens) - given} new ones, and the model {model.name!r} "
                           f"takes at most {model.max_length}; shorten the text or ask for fewer", param="prompt",
                           code="context_length_exceeded")


def _split(model: ServedModel, text: str, gap_length: int) -> list[Segment]:
    """Returns the segments of a text with gaps, which are together no longer than a row of the model."""
    try:
        segments = split_gaps(text, gap_length)
    except ValueError as error:  # a number of thousands of digits
        raise RequestError("the length of a gap is too long a number", param="prompt") from error
    gaps = [segment for segment in segments if not isinstance(segment, str)]
    longest = sum(gap[-1] if isinstance(gap, range) else gap for gap in gaps)
    if longest >= model.max_length:
        raise RequestError(f"{longest} tokens in the gaps of a prompt, and the model {model.name!r} takes at most "
                           f"{model.max_length} with the text around them", param="prompt")
    tried = sum(len(gap) for gap in gaps if isinstance(gap, range))
    if tried > MAX_GAP_LENGTHS:
        raise RequestError(f"the gaps of a prompt have {tried} possible lengths, and at most {MAX_GAP_LENGTHS} are "
                           "tried; narrow their ranges", param="prompt")
    return segments


def _encode(model: ServedModel, prompt: str | list[int], text: list[Segment]) -> tuple[list[int], list[range]]:
    if isinstance(prompt, str):
        return model.encode(text)
    vocab_size = model.lm.config.vocab_size
    if not 0 <= min(prompt) <= max(prompt) < vocab_size:
        raise RequestError(f"token ids must be in 0 .. {vocab_size - 1}, the vocabulary of the model {model.name!r}",
                           param="prompt")
    (_, *tokens), gaps = model.encode(text)  # the ids are in place of the start token
    return [*prompt, *tokens], [range(gap.start + len(prompt) - 1, gap.stop + len(prompt) - 1) for gap in gaps]
