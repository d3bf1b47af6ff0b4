"""Conversations as the text that a chat template writes: one example per message of the assistant."""

import dataclasses
import functools
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dlm_jax.data.records import BadRecord, get_text
from dlm_jax.data.tokenization import tokenize
from dlm_jax.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]  # role, content and whatever else a template may read

_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
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

    def turns(self, messages: list[Message]) -> list[Turn]:
        """Returns one turn per message of the assistant; its prompt is the conversation before it.

        Raises:
          BadRecord: there is none, one is blank or answers nothing, or the template cannot write it.
        """
        answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        if not answers:
            raise BadRecord("no message is the assistant's, so there is none to learn")
        return [self._turn(messages[:number], messages[number]) for number in answers]

    def _turn(self, history: list[Message], message: Message) -> Turn:
        place = f"message {len(history) + 1}"
        check_not_blank(place, message["content"])
        text, prompt = self.prompt(history)
        rendered, end = self._try_render([*history, message], place), self.turn_end
        if not rendered.endswith(end.text):
            raise BadRecord(f"the chat template ends {place} with {rendered[-20:]!r}, not with {end.text!r}")
        ids, = tokenize(self.tokenizer, [rendered.removesuffix(end.text) + end.learned], special_tokens=True)
        if ids[:len(prompt)] != prompt:
            raise BadRecord(f"the tokens before {place} change when it is added, so that no prompt leads to it")
        return Turn(text, prompt, ids[len(prompt):], end.token_id is not None)

    def prompt(self, history: list[Message]) -> tuple[str, list[int]]:
        """Returns the text of a history up to where the assistant's next message starts, and its token ids.

        Raises:
          BadRecord: the history is blank, or the template cannot write it.
        """
        place = f"message {len(history) + 1}"
        check_not_blank(f"history before {place}", "".join(before["content"] for before in history))
        text = self._try_render(history, place, add_generation_prompt=True)
        ids, = tokenize(self.tokenizer, [text], special_tokens=True)
        return text, ids

    @functools.cached_property
    def template(self) -> str:
        """The template's text."""
        if self.file is not None:
            try:
                return Path(self.file).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"the chat template {self.file} cannot be read ({error})") from error
        if self.tokenizer.chat_template is None:
            raise DataError(f"the tokenizer {self.tokenizer.name_or_path!r} has no chat template to write messages "
                            "with; name a file that has one (data.examples.chat_template, or --chat_template of chat)")
        return self.tokenizer.get_chat_template()

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

    def _try_render(self, messages: list[Message], place: str, *, add_generation_prompt: bool = False) -> str:
        try:
            return self._render(messages, add_generation_prompt=add_generation_prompt)
        except Exception as error:  # a template is a program: it can fail in any way
            raise BadRecord(f"the chat template fails at {place} ({error})") from error

    def _render(self, messages: list[Message], *, add_generation_prompt: bool = False) -> str:
        return self.tokenizer.apply_chat_template(messages, chat_template=self.template, tokenize=False,
                                                  add_generation_prompt=add_generation_prompt)


def get_messages(record: dict[str, Any], key: str) -> list[Message]:
    """Returns the messages under `key`, as {role, content}; ShareGPT's {from, value} is accepted too.

    Raises:
      BadRecord: there is no list of such messages.
    """
    if not isinstance(messages := record.get(key), list):
        raise BadRecord(f"no list of messages under {key!r} (it has {', '.join(map(str, record))})")
    found = []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            raise BadRecord(f"message {number}: {type(message).__name__} where role and content were expected")
        if "from" in message:
            message = {"role": message["from"], "content": message.get("value")}
        try:
            role, _ = get_text(message, "role"), get_text(message, "content")
        except BadRecord as error:
            raise BadRecord(f"message {number}: {error}") from error
        found.append({**message, "role": _SHAREGPT_ROLES.get(role, role)})
    return found


def check_not_blank(what: str, text: str) -> None:
    """Raises BadRecord if the text is blank."""
    if not text.strip():
        raise BadRecord(f"a blank {what}")
