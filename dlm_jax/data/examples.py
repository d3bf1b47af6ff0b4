"""Fine-tuning records as rows: what is asked, then the response to learn, one example a row.

A row is [BOS] prompt separator response EOS and padding. The prompt with its separator is tokenised apart from the
response, so that generation, which has only the prompt, begins with the same ids. A conversation needs no separator:
there a chat template writes what stands around each turn.
"""

import dataclasses
import functools
import itertools
import re
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dlm_jax.data.chat import Chat, Message, messages_of, refuse_blank
from dlm_jax.data.config import ExampleConfig
from dlm_jax.data.encode import Piece
from dlm_jax.data.records import BadRecord, text_of
from dlm_jax.data.tokenize import encode
from dlm_jax.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
class ExampleForm:
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
    def planes(self) -> tuple[str, ...]:
        return ("maskable",) if self.config.padding == "trained" else ("starts", "maskable")

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
        if longest > self.length and self.config.too_long == "refuse":
            raise DataError(f"an example of {longest} tokens does not fit a row of {self.length}; raise data.length, "
                            "or set data.examples.too_long to truncate or drop")
        return key, examples

    def encode(self, items: list[list[Example]], counts: Counter) -> Piece:
        """One row an example; counts the examples, and how many of them were truncated, and how many more dropped."""
        examples = [example for item in items for example in item]
        truncate, trained = self.config.too_long == "truncate", self.config.padding == "trained"
        # An example that is cut must keep a token to learn.
        kept = [e for e in examples if (len(e.prompt) < self.length if truncate else e.length <= self.length)]
        tokens = np.full((len(kept), self.length), self._pad, np.uint32)
        starts = np.zeros(tokens.shape, bool)
        maskable = np.full(tokens.shape, trained)
        for row, example in enumerate(kept):
            begin, end = len(example.prompt), min(example.length, self.length)
            tokens[row, :end] = [*example.prompt, *example.response][:end]
            maskable[row, :begin] = False
            maskable[row, begin:end] = True
            starts[row, 0] = True
            starts[row, end : end + 1] = not trained  # a segment of its own, so that nothing sees the padding
        counts["examples"] += len(kept)
        counts["truncated"] += sum(example.length > self.length for example in kept)
        counts["dropped"] += len(examples) - len(kept)
        return Piece(tokens.reshape(-1), starts.reshape(-1), maskable.reshape(-1))

    def prompt_ids(self, record: str | dict[str, Any]) -> list[int]:
        """What generation begins with: the token ids that stand before the response in a row of this record.

        The record needs no response. Of a conversation it is all of it, up to where the assistant goes on.

        Raises:
          BadRecord: the record asks nothing, or cannot be written.
        """
        if self._chat:
            _, prompt = self._chat.prompt(messages_of(record, self.config.messages_key))
            return self._begun(prompt)
        return self._begun(self._asked(self._question(record)))

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
        mark = self._chat and self._chat.turn_end.mark
        return (self._eos,) if mark in (None, self._eos) else (mark, self._eos)

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

    def _begun(self, prompt: list[int]) -> list[int]:
        """`prompt` with what position 0 holds, if it does not begin with that."""
        if not prompt:
            raise BadRecord("the prompt has no token")
        first = self.tokenizer.bos_token_id
        if first is None and not self._chat:  # generation then begins with EOS; a chat template has its own beginning
            first = self._eos
        return prompt if first is None or prompt[0] == first else [first, *prompt]

    def _example(self, prompt: list[int], response: list[int], closed: bool = False) -> Example:
        """`closed`: the response ends with a mark of its own, which is learnt in place of EOS."""
        prompt = self._begun(prompt)
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
