"""Conversations as the text that a chat template writes: one example per message of the assistant."""

import dataclasses
import functools
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dlm_jax.data.records import BadRecord, get_text
from dlm_jax.data.special_tokens import hide, show, tokenize_rendered
from dlm_jax.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]  # role, content and whatever else a template may read

_ROLES = {  # other spellings, those of ShareGPT's data among them
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "bot": "assistant", "model": "assistant", "observation": "tool",
    **{role: role for role in ("system", "user", "assistant", "tool")}}
_ANSWER = "dlm-jax-answer"  # a placeholder, to see what a template writes after an answer


class Turn(NamedTuple):
    """A message of the assistant and what precedes it.

    Attributes:
      text: the history, up to where the assistant starts.
      prompt: its token ids.
      response: the token ids that the assistant adds.
      closed: whether the last of these is the template's end-of-turn token.
    """

    text: str
    prompt: list[int]
    response: list[int]
    closed: bool


class TurnEnd(NamedTuple):
    """The text that a template writes after an answer.

    Attributes:
      text: all of it.
      learned: the text up to the end-of-turn token, which is learned.
      token_id: the id of that token; None where the template has none.
    """

    text: str
    learned: str
    token_id: int | None


@dataclasses.dataclass(frozen=True, eq=False)
class ChatTemplate:
    """A chat template from a file, or the tokenizer's own.

    Raises:
      ConfigError: the file cannot be read.
      DataError: there is no template, or it cannot write a question and an answer.
    """

    tokenizer: "PreTrainedTokenizerBase"
    file: str | None = None

    def __post_init__(self) -> None:
        _ = self.template, self.turn_end  # read and tried here, once, before the first record

    def turns(self, messages: list[Message], tools: list[Any] | None = None) -> list[Turn]:
        """Returns one turn per message of the assistant; its prompt is the conversation before it.

        Args:
          tools: descriptions of the functions that the assistant may call, as OpenAI's API takes them.

        Raises:
          BadRecord: there is none, one is blank or answers nothing, or the template cannot write it.
        """
        answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        if not answers:
            raise BadRecord("no message is the assistant's, so there is none to learn")
        return [self._turn(messages[:number], messages[number], tools) for number in answers]

    def _turn(self, history: list[Message], message: Message, tools: list[Any] | None) -> Turn:
        place = f"message {len(history) + 1}"
        if not message.get("tool_calls"):
            check_not_blank(place, message["content"])
        text, prompt = self.prompt(history, tools)
        rendered, end = self._try_render([*history, message], place, tools), self.turn_end
        if not rendered.endswith(end.text):
            raise BadRecord(f"the chat template ends {place} with {rendered[-20:]!r}, not with {end.text!r}")
        ids = tokenize_rendered(self.tokenizer, rendered.removesuffix(end.text) + end.learned)
        if ids[:len(prompt)] != prompt:
            raise BadRecord(f"the tokens before {place} change when it is added, so that no prompt leads to it")
        return Turn(text, prompt, ids[len(prompt):], end.token_id is not None)

    def prompt(self, history: list[Message], tools: list[Any] | None = None) -> tuple[str, list[int]]:
        """Returns the text of a history up to where the assistant's next message starts, and its token ids.

        Raises:
          BadRecord: the history is blank, or the template cannot write it.
        """
        place = f"message {len(history) + 1}"
        check_not_blank(f"history before {place}", "".join(before["content"] for before in history))
        rendered = self._try_render(history, place, tools, add_generation_prompt=True)
        return show(self.tokenizer, rendered), tokenize_rendered(self.tokenizer, rendered)

    @functools.cached_property
    def template(self) -> str:
        """The template's text."""
        if self.file is not None:
            try:
                return Path(self.file).read_text(encoding="utf-8-sig")
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"the chat template {self.file} cannot be read ({error})") from error
        if self.tokenizer.chat_template is None:
            raise DataError(f"the tokenizer {self.tokenizer.name_or_path!r} has no chat template to write messages "
                            "with; name a file that has one (data.examples.chat_template, or --chat_template of chat)")
        try:
            return self.tokenizer.get_chat_template()
        except ValueError as error:  # several, and none of them the default
            raise DataError(f"the tokenizer {self.tokenizer.name_or_path!r} has several chat templates "
                            f"({', '.join(self.tokenizer.chat_template)}) and no default; write one to a file, and "
                            "name it (data.examples.chat_template, or --chat_template of chat)") from error

    @functools.cached_property
    def turn_end(self) -> TurnEnd:
        problem = "it omits the answer"
        try:
            rendered = self._render([{"role": "user", "content": "a"}, {"role": "assistant", "content": _ANSWER}])
        except Exception as error:  # a template is a program: it can fail in any way
            rendered, problem = "", str(error)
        _, found, text = rendered.rpartition(_ANSWER)
        if not found:
            raise DataError(f"the chat template {self.file or 'of the tokenizer'} cannot write a question and its "
                            f"answer ({problem}); name a file with another (data.examples.chat_template, or "
                            "--chat_template of chat)")
        added = sorted(map(str, self.tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
        token = re.search("|".join(re.escape(token) for token in added if token.strip()) or "(?!)", text)
        if token is None:
            return TurnEnd(text, text.rstrip(), None)
        return TurnEnd(text, text[:token.end()], self.tokenizer.convert_tokens_to_ids(token[0]))

    def _try_render(self, messages: list[Message], place: str, tools: list[Any] | None, *,
                    add_generation_prompt: bool = False) -> str:
        """Returns what the template writes of messages and tools, whose special tokens are hidden."""
        for name, used in (("tools", tools), ("tool_calls", any(message.get("tool_calls") for message in messages))):
            if used and not re.search(rf"\b{name}\b", self.template):
                raise BadRecord(f"it has {name}, which the chat template {self.file or 'of the tokenizer'} does not "
                                "write; name a file with one that does (data.examples.chat_template)")
        messages, tools = hide(self.tokenizer, [messages, tools])
        try:
            return self._render(messages, tools, add_generation_prompt=add_generation_prompt)
        except Exception as error:  # a template is a program: it can fail in any way
            raise BadRecord(f"the chat template fails at {place} ({error})") from error

    def _render(self, messages: list[Message], tools: list[Any] | None = None, *,
                add_generation_prompt: bool = False) -> str:
        return self.tokenizer.apply_chat_template(messages, tools=tools, chat_template=self.template, tokenize=False,
                                                  add_generation_prompt=add_generation_prompt)


def get_tools(record: dict[str, Any]) -> list[Any] | None:
    """Returns the tools of a record, a list or one written as JSON text; None without any.

    Raises:
      BadRecord: they are something else.
    """
    if record.get("functions"):
        raise BadRecord("it has 'functions', OpenAI's older form of tools; write them as 'tools'")
    tools = _parse_json(record.get("tools") or None, "tools")
    if tools is not None and not isinstance(tools, list):
        raise BadRecord(f"{type(tools).__name__} under 'tools' where a list was expected")
    return tools or None


def get_messages(record: dict[str, Any], key: str) -> list[Message]:
    """Returns the messages under `key`, as {role, content}; ShareGPT's {from, value} is accepted too.

    As in OpenAI's API, content may be a list of parts, whose texts are joined by newlines, and a message with
    `tool_calls` needs no content; arguments in JSON text are parsed, as chat templates expect. A record's `system`, as
    in ShareGPT's data, becomes the first message.

    Raises:
      BadRecord: there is no list of such messages.
    """
    if not isinstance(messages := record.get(key), list):
        raise BadRecord(f"no list of messages under {key!r} (it has {', '.join(map(str, record))})")
    found = []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            raise BadRecord(f"message {number}: {type(message).__name__} where role and content were expected")
        try:
            found.append(_read_message(message))
        except BadRecord as error:
            raise BadRecord(f"message {number}: {error}") from error
    if record.get("system"):
        if found and found[0]["role"] == "system":
            raise BadRecord("a system prompt under 'system', and another as the first message")
        found.insert(0, {"role": "system", "content": get_text(record, "system")})
    return found


def _read_message(message: Message) -> Message:
    if message.get("from") is not None:
        message = {"role": message["from"], "content": message.get("value")}
    if message.get("function_call"):
        raise BadRecord("it has 'function_call', OpenAI's older form of a call; write it as 'tool_calls'")
    calls = message.get("tool_calls")
    if calls and message.get("content") is None:
        message = {**message, "content": ""}
    if isinstance(message.get("content"), list):
        message = {**message, "content": "\n".join(map(_part_text, message["content"]))}
    role, _ = get_text(message, "role"), get_text(message, "content")
    message = {**message, "role": _ROLES.get(role.strip().lower(), role)}
    if message["role"] == "assistant" and message.get("weight") == 0:
        raise BadRecord("it has weight 0, and every message of the assistant is learned; remove it or its weight")
    if not calls:
        return message
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise BadRecord("'tool_calls' is no list of calls")
    return message | {"tool_calls": [_read_call(call) for call in calls]}


def _part_text(part: Any) -> str:
    """Returns the text of a part of a message, as OpenAI's API takes them."""
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind != "text":
        raise BadRecord(f"a part of the type {kind!r} in 'content'; only parts of text can be read")
    return get_text(part, "text")


def _read_call(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, dict):  # a call without the wrapper
        return call if "arguments" not in call else call | {"arguments": _parse_json(call["arguments"], "arguments")}
    return call | {"function": function | {"arguments": _parse_json(function.get("arguments"), "arguments")}}


def _parse_json(value: Any, name: str) -> Any:
    """Returns a value, from JSON if it is text."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise BadRecord(f"{name!r} is text that is not JSON ({error})") from error


def check_not_blank(what: str, text: str) -> None:
    """Raises BadRecord if the text is blank."""
    if not text.strip():
        raise BadRecord(f"a blank {what}")
