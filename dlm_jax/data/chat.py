"""Conversations as a chat template writes them, parted into what the assistant is given and what it learns to say."""

import dataclasses
import functools
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dlm_jax.data.records import BadRecord, text_of
from dlm_jax.data.tokenize import encode
from dlm_jax.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]  # role, content and whatever else a template may read

_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
_ANSWER = "dlm-jax-answer"  # stands for an answer when the template is asked what it writes after one


class Turn(NamedTuple):
    """Attributes:
    text: the history, up to where the assistant begins.
    prompt: its token ids.
    response: the token ids that the assistant adds.
    closed: whether the last of these is the template's end-of-turn mark.
    """

    text: str
    prompt: list[int]
    response: list[int]
    closed: bool


class TurnEnd(NamedTuple):
    """What a template writes after an answer: `written` in all, `kept` up to the end-of-turn mark.

    `mark`: the id of that mark, where it is a token of its own.
    """

    written: str
    kept: str
    mark: int | None


@dataclasses.dataclass(frozen=True, eq=False)
class Chat:
    """The chat template of a file, or without one of the tokenizer.

    Raises:
      ConfigError: the file cannot be read.
      DataError: there is no template, or it cannot write a question and an answer.
    """

    tokenizer: "PreTrainedTokenizerBase"
    file: str | None = None

    def __post_init__(self) -> None:
        _ = self.template, self.turn_end  # read and tried here, once, before the first record

    def turns(self, messages: list[Message]) -> list[Turn]:
        """One for each message of the assistant's; its prompt is all that was said before.

        Raises:
          BadRecord: there is none, one is blank or answers nothing, or the template has no place for it.
        """
        answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        if not answers:
            raise BadRecord("no message is the assistant's, so there is none to learn")
        return [self._turn(messages[:number], messages[number]) for number in answers]

    def _turn(self, history: list[Message], message: Message) -> Turn:
        where = f"message {len(history) + 1}"
        refuse_blank(where, message["content"])
        text, prompt = self.prompt(history)
        whole, end = self._written([*history, message], where), self.turn_end
        if not whole.endswith(end.written):
            raise BadRecord(f"the chat template ends {where} with {whole[-20:]!r}, not with {end.written!r}")
        ids, = encode(self.tokenizer, [whole.removesuffix(end.written) + end.kept])
        if ids[:len(prompt)] != prompt:
            raise BadRecord(f"the tokens before {where} are others once it follows, so that no prompt leads to it")
        return Turn(text, prompt, ids[len(prompt):], end.mark is not None)

    def prompt(self, history: list[Message]) -> tuple[str, list[int]]:
        """The text of a history up to where the assistant's next message begins, and its token ids.

        Raises:
          BadRecord: nothing has been said, or the template has no place for it.
        """
        where = f"message {len(history) + 1}"
        refuse_blank(f"history before {where}", "".join(before["content"] for before in history))
        text = self._written(history, where, prompting=True)
        ids, = encode(self.tokenizer, [text])
        return text, ids

    def _written(self, messages: list[Message], where: str, *, prompting: bool = False) -> str:
        try:
            return self._render(messages, prompting=prompting)
        except Exception as error:  # a template is a program: it can fail in any way
            raise BadRecord(f"the chat template fails at {where} ({error})") from error

    @functools.cached_property
    def template(self) -> str:
        """Its text."""
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
        problem = "it leaves out the answer"
        try:
            whole = self._render([{"role": "user", "content": "a"}, {"role": "assistant", "content": _ANSWER}])
        except Exception as error:  # a template is a program: it can fail in any way
            whole, problem = "", str(error)
        _, found, written = whole.rpartition(_ANSWER)
        if not found:
            raise DataError(f"the chat template {self.file or 'of the tokenizer'} cannot write a question and its "
                            f"answer ({problem}); name a file with another (data.examples.chat_template, or "
                            "--chat_template of chat)")
        marks = sorted(map(str, self.tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
        mark = re.search("|".join(re.escape(mark) for mark in marks if mark.strip()) or "(?!)", written)
        if mark is None:
            return TurnEnd(written, written.rstrip(), None)
        return TurnEnd(written, written[:mark.end()], self.tokenizer.convert_tokens_to_ids(mark[0]))

    def _render(self, messages: list[Message], *, prompting: bool = False) -> str:
        return self.tokenizer.apply_chat_template(messages, chat_template=self.template, tokenize=False,
                                                  add_generation_prompt=prompting)


def messages_of(record: dict[str, Any], key: str) -> list[Message]:
    """The messages under `key`, as {role, content}; ShareGPT's {from, value} is taken too.

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
            role, _ = text_of(message, "role"), text_of(message, "content")
        except BadRecord as error:
            raise BadRecord(f"message {number}: {error}") from error
        found.append({**message, "role": _SHAREGPT_ROLES.get(role, role)})
    return found


def refuse_blank(what: str, text: str) -> None:
    """Raises BadRecord where there is nothing to say or to learn."""
    if not text.strip():
        raise BadRecord(f"a blank {what}")
