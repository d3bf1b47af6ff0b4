"""Conversations as a chat template writes them, parted into what the assistant is given and what it learns to say."""

import dataclasses
import functools
import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dlm_jax.data.config import ExampleConfig
from dlm_jax.data.records import BadRecord, TokenSpan, encode, text_of
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


# ---- Fine-tuning records as rows: what is asked, then the response to learn, one example a row.
#
# A row is [BOS] prompt separator response EOS and padding. The prompt with its separator is tokenised apart from the
# response, so that generation, which has only the prompt, begins with the same ids. A conversation needs no separator:
# there a chat template writes what stands around each turn.


Question = str | list[Message]  # a text, or a conversation

# The prompts of Alpaca, from PROMPT_DICT in train.py of github.com/tatsu-lab/stanford_alpaca.
_ALPACA = ("Below is an instruction that describes a task. Write a response that appropriately completes the request."
           "\n\n### Instruction:\n{instruction}\n\n### Response:")
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}"
    "\n\n### Response:")


class Example(NamedTuple):
    """Token ids: `prompt` with BOS and separator, never noised; `response` with its EOS."""

    prompt: list[int]
    response: list[int]

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.response)


@dataclasses.dataclass(frozen=True, eq=False)
class PromptFormat:
    """Records of prompts and responses: each example becomes one row of `length` tokens.

    An example is held out by its prompt, a conversation by its first: no question lies in both parts.

    Raises:
      ConfigError: the format, the padding token or the file of the chat template cannot be used.
      DataError: the tokenizer has no EOS, or messages have no chat template, or one that does not work.
    """

    tokenizer: "PreTrainedTokenizerBase"
    config: ExampleConfig
    length: int

    def __post_init__(self) -> None:
        if self._eos is None:
            raise DataError(f"the tokenizer {self.tokenizer.name_or_path!r} has no EOS token to end a response with")
        _ = self.columns, self._pad, self._chat  # each checks a setting, here and not at the first record
        if self.config.split_digits and self.tokenizer.decode(self._encode("a1b23")) != "a1b23":
            raise ConfigError("data.examples.split_digits does not go with the tokenizer "
                              f"{self.tokenizer.name_or_path!r}, which parts a text with spaces; set it to false")

    @functools.cached_property
    def columns(self) -> tuple[str, ...]:
        """The keys read, for a pair the prompt's first and the response's last."""
        config = self.config
        formats = {
            "prompt_response": (config.prompt_key, config.response_key),
            "messages": (config.messages_key,),
            "alpaca": ("instruction", "input", "output"),  # a record may lack the input
            "gsm8k": ("question", "answer"),
            "gsm8k_symbolic": ("text",),
        }
        if config.format not in formats:
            raise ConfigError(f"data.examples.format is {config.format!r}; examples are one of {', '.join(formats)}")
        return formats[config.format]

    @property
    def row_masks(self) -> tuple[str, ...]:
        return ("noisable_mask",) if self.config.train_on_padding else ("starts", "noisable_mask")

    @property
    def facts(self) -> list[Any]:
        return [self._pad, self._chat and self._chat.template]

    def read(self, record: str | dict[str, Any]) -> tuple[str, list[Example]] | None:
        if isinstance(record, str) and not record.strip():
            return None
        if isinstance(record, str) and self.config.format != "gsm8k_symbolic":
            raise BadRecord(f"a text where a record with {', '.join(self.columns)} was expected")
        if self._chat:
            turns = self._chat.turns(messages_of(record, self.config.messages_key))
            key, examples = turns[0].text, [self._example(turn.prompt, turn.response, turn.closed) for turn in turns]
        else:
            key, answer = self._question(record), self._answer(record)
            examples = [self._example(self._asked(key), self._encode(answer))]
        longest = max(example.length for example in examples)
        if longest > self.length and self.config.overlong == "error":
            raise DataError(f"an example of {longest} tokens does not fit a row of {self.length}; raise data.length, "
                            "or set data.examples.overlong to truncate or drop")
        return key, examples

    def encode(self, items: list[list[Example]], counts: Counter) -> TokenSpan:
        """One row an example; counts the examples, and how many of them were truncated, and how many more dropped."""
        examples = [example for item in items for example in item]
        truncate, trained = self.config.overlong == "truncate", self.config.train_on_padding
        # An example that is cut must keep a token to learn.
        kept = [e for e in examples if (len(e.prompt) < self.length if truncate else e.length <= self.length)]
        tokens = np.full((len(kept), self.length), self._pad, np.uint32)
        starts = np.zeros(tokens.shape, bool)
        noisable_mask = np.full(tokens.shape, trained)
        for row, example in enumerate(kept):
            begin, end = len(example.prompt), min(example.length, self.length)
            tokens[row, :end] = [*example.prompt, *example.response][:end]
            noisable_mask[row, :begin] = False
            noisable_mask[row, begin:end] = True
            starts[row, 0] = True
            starts[row, end : end + 1] = not trained  # a segment of its own, so that nothing sees the padding
        counts["examples"] += len(kept)
        counts["truncated"] += sum(example.length > self.length for example in kept)
        counts["dropped"] += len(examples) - len(kept)
        return TokenSpan(tokens.reshape(-1), starts.reshape(-1), noisable_mask.reshape(-1))

    def prompt_ids(self, record: str | dict[str, Any]) -> list[int]:
        """What generation begins with: the token ids that stand before the response in a row of this record.

        The record needs no response. Of a conversation it is all of it, up to where the assistant goes on.

        Raises:
          BadRecord: the record asks nothing, or cannot be written.
        """
        if self._chat:
            _, prompt = self._chat.prompt(messages_of(record, self.config.messages_key))
            return self._prepend_bos(prompt)
        return self._prepend_bos(self._asked(self._question(record)))

    def ask(self, question: Question) -> list[int]:
        """The `prompt_ids` of a question that somebody asks: a text, or with messages also a conversation.

        Raises:
          DataError: it cannot be asked so.
        """
        if self._chat and isinstance(question, str):
            question = [{"role": "user", "content": question}]
        try:
            return self.prompt_ids({self.columns[0]: question})
        except BadRecord as error:
            raise DataError(f"this cannot be asked as {self.config.format}: {error}") from error

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a response: EOS, and before it the end-of-turn mark of a chat template that has one."""
        cursor = self._chat and self._chat.turn_end.cursor
        return (self._eos,) if cursor in (None, self._eos) else (cursor, self._eos)

    def response_text(self, tokens: Sequence[int]) -> str:
        """What the token ids of a response before its end say, without space around it."""
        text = self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False).rstrip()
        return text.removesuffix(self._chat.turn_end.kept if self._chat else "").strip()

    def _question(self, record: str | dict[str, Any]) -> str:
        """The text of a prompt, without its separator."""
        prompt = text_of(record, self.columns[0])
        if self.config.format == "gsm8k_symbolic":
            prompt = prompt.strip().partition("||")[0]
        refuse_blank("prompt", prompt)
        if self.config.format == "alpaca":
            more = "" if record.get("input") is None else text_of(record, "input")
            prompt = (_ALPACA_WITH_INPUT if more.strip() else _ALPACA).format(instruction=prompt, input=more)
        return prompt

    def _answer(self, record: str | dict[str, Any]) -> str:
        response = text_of(record, self.columns[-1])
        if self.config.format == "gsm8k_symbolic":
            _, bar, response = response.strip().partition("||")
            if not bar:
                raise BadRecord("no || between question and answer")
        refuse_blank("response", response)
        return response

    def _asked(self, question: str) -> list[int]:
        return self._encode(question + self.config.separator)

    def _encode(self, text: str) -> list[int]:
        """The token ids of a text, none of them special."""
        parts = re.findall(r"\d|\D+", text) if self.config.split_digits else [text]
        return list(itertools.chain.from_iterable(encode(self.tokenizer, parts)))

    def _prepend_bos(self, prompt: list[int]) -> list[int]:
        """`prompt` with what position 0 holds, if it does not begin with that."""
        if not prompt:
            raise BadRecord("the prompt has no token")
        first = self.tokenizer.bos_token_id
        if first is None and not self._chat:  # generation then begins with EOS; a chat template has its own beginning
            first = self._eos
        return prompt if first is None or prompt[0] == first else [first, *prompt]

    def _example(self, prompt: list[int], response: list[int], closed: bool = False) -> Example:
        """`closed`: the response ends with a mark of its own, which is learnt in place of EOS."""
        prompt = self._prepend_bos(prompt)
        if not response:
            raise BadRecord("the response has no token")
        if self._eos in response[:-1]:
            raise BadRecord("the response has EOS in its midst")
        return Example(prompt, response if closed or response[-1] == self._eos else [*response, self._eos])

    @functools.cached_property
    def _chat(self) -> Chat | None:
        return Chat(self.tokenizer, self.config.chat_template) if self.config.format == "messages" else None

    @functools.cached_property
    def _eos(self) -> int | None:
        return self.tokenizer.eos_token_id

    @functools.cached_property
    def _pad(self) -> int:
        token = self.config.pad_token
        if token is None:
            return self._eos if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        vocabulary = self.tokenizer.get_vocab()
        if token not in vocabulary:
            raise ConfigError(f"data.examples.pad_token is {token!r}, which is not a token of the tokenizer "
                              f"{self.tokenizer.name_or_path!r}; name one that is")
        return vocabulary[token]


# ---- How a model is asked: as the examples were written that it learnt from, which the record of its run tells.


_GROUP = "data.examples."


def prompt_format_from_run(tokenizer: "PreTrainedTokenizerBase", recipe: Mapping[str, Any], length: int,
                  **settings: Any) -> PromptFormat:
    """The form of the examples of a run. Without a record of any, the messages of the tokenizer's chat template.

    Args:
      recipe: the settings of the run by dotted keys, {} where unknown.
      length: the most tokens the model takes.
      settings: fields of `ExampleConfig` that count in place of what is on record.

    Raises:
      ConfigError: there is neither a record nor a chat template, or a setting cannot be used.
      DataError: the tokenizer has no EOS, or the chat template cannot be used.
    """
    fields = [field.name for field in dataclasses.fields(ExampleConfig)]
    recorded = {name: recipe[_GROUP + name] for name in fields if _GROUP + name in recipe}
    recorded["chat_template"] = None  # that file's content is the tokenizer's own since the run began
    config = ExampleConfig(**recorded | settings)
    if config.format == "none":
        if config.chat_template is None and tokenizer.chat_template is None:
            raise ConfigError("no form of question and answer is on record with the model, and its tokenizer has no "
                              "chat template; say how it is to be asked: format=alpaca or another (--format), or "
                              "chat_template=FILE (--chat_template)")
        config = dataclasses.replace(config, format="messages")
    if config.format != "messages" and config.chat_template is not None:
        raise ConfigError(f"a chat template is for messages, and the format is {config.format}; leave one of them out")
    if config.format == "messages" and "separator" in settings:
        raise ConfigError("messages have no separator, their chat template writes what stands between; leave it out")
    return PromptFormat(tokenizer, config, length)
