"""Fine-tuning records as rows, one example per row, and the same prompt format for questions to the trained model.

A row is [BOS] prompt separator response EOS and padding. The prompt with its separator is tokenized apart from the
response, so that generation, which has only the prompt, starts from the same ids. A conversation needs no separator:
a chat template writes the text around each turn.
"""

import dataclasses
import functools
import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dlm_jax.data.chat_template import ChatTemplate, Message, check_not_blank, get_messages, get_tools
from dlm_jax.data.config import ExampleConfig
from dlm_jax.data.records import BadRecord, get_text
from dlm_jax.data.rows import TokenSpan
from dlm_jax.data.tokenization import is_rendered, prepend_start, start_token, tokenize
from dlm_jax.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Prompt = str | list[Message]  # a text, or a conversation

_CONFIG_GROUP = "data.examples."
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
    """A `RecordEncoder` of prompts and responses: each example becomes one row of `length` tokens.

    An example is held out by its prompt, a conversation by its first: no prompt is in both splits.

    Attributes:
      start: the token of position 0; None: what the tokenizer puts there, see `tokenization.start_token`.

    Raises:
      ConfigError: the format, the padding token or the file of the chat template cannot be used.
      DataError: the tokenizer has no EOS, or messages have no chat template, or one that does not work.
    """

    tokenizer: "PreTrainedTokenizerBase"
    config: ExampleConfig
    length: int
    start: int | None = None

    def __post_init__(self) -> None:
        if self._eos is None:
            raise DataError(f"the tokenizer {self.tokenizer.name_or_path!r} has no EOS token to end a response with")
        _ = self.columns, self._pad, self._chat, self._start  # each checks a setting, here and not at the first record
        if self.config.split_digits and self.tokenizer.decode(self._tokenize("a1b23")) != "a1b23":
            raise ConfigError("data.examples.split_digits does not work with the tokenizer "
                              f"{self.tokenizer.name_or_path!r}, which adds spaces between digits; set it to false")

    @functools.cached_property
    def columns(self) -> tuple[str, ...]:
        """The keys that are read; of a pair, the prompt's is the first and the response's the last."""
        config = self.config
        formats = {
            "prompt_response": (config.prompt_key, config.response_key),
            "messages": (config.messages_key, "tools", "functions", "system"),  # a record may lack all but the first
            "alpaca": ("instruction", "input", "output"),  # a record may lack the input
            "gsm8k": ("question", "answer"),
            "gsm8k_symbolic": ("text",),
        }
        if config.format not in formats:
            raise ConfigError(f"data.examples.format is {config.format!r}; for examples, set it to one of "
                              f"{', '.join(formats)}")
        return formats[config.format]

    @property
    def row_masks(self) -> tuple[str, ...]:
        return ("noisable_mask",) if self.config.train_on_padding else ("starts", "noisable_mask")

    @property
    def facts(self) -> list[Any]:
        return [self._pad, self._start, self._chat and self._chat.template]

    def parse(self, record: str | dict[str, Any]) -> tuple[str, list[Example]] | None:
        if isinstance(record, str) and not record.strip():
            return None
        if isinstance(record, str) and self.config.format != "gsm8k_symbolic":
            raise BadRecord(f"a text where a record with {', '.join(self.columns)} was expected")
        if self._chat:
            turns = self._chat.turns(get_messages(record, self.config.messages_key), get_tools(record))
            key, examples = turns[0].text, [self._example(self._prepend_start(turn.prompt, rendered=True),
                                                          turn.response, turn.closed) for turn in turns]
        else:
            key, response = self._prompt_text(record), self._response_text(record)
            examples = [self._example(self._encode_text(key), self._tokenize(response))]
        longest = max(example.length for example in examples)
        if longest > self.length and self.config.overlong == "error":
            raise DataError(f"an example of {longest} tokens does not fit a row of {self.length}; raise data.length, "
                            "or set data.examples.overlong to truncate or drop")
        return key, examples

    def encode(self, items: list[list[Example]], counts: Counter) -> TokenSpan:
        """Returns one row per example; counts the examples, the truncated ones among them, and those dropped."""
        examples = [example for item in items for example in item]
        truncate, train_on_padding = self.config.overlong == "truncate", self.config.train_on_padding
        # A truncated example must keep a token to learn.
        kept = [e for e in examples if (len(e.prompt) < self.length if truncate else e.length <= self.length)]
        tokens = np.full((len(kept), self.length), self._pad, np.uint32)
        starts = np.zeros(tokens.shape, bool)
        noisable_mask = np.full(tokens.shape, train_on_padding)
        for row, example in enumerate(kept):
            start, end = len(example.prompt), min(example.length, self.length)
            tokens[row, :end] = [*example.prompt, *example.response][:end]
            noisable_mask[row, :start] = False
            noisable_mask[row, start:end] = True
            starts[row, 0] = True
            starts[row, end : end + 1] = not train_on_padding  # a segment of its own: nothing attends to the padding
        counts["examples"] += len(kept)
        counts["truncated"] += sum(example.length > self.length for example in kept)
        counts["dropped"] += len(examples) - len(kept)
        return TokenSpan(tokens.reshape(-1), starts.reshape(-1), noisable_mask.reshape(-1))

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        """Returns the token ids that generation starts from, for a text or, with messages, also a conversation.

        Raises:
          DataError: the prompt does not fit the format.
        """
        if self._chat and isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        try:
            return self.encode_record_prompt({self.columns[0]: prompt})
        except BadRecord as error:
            raise DataError(f"this prompt does not fit the format {self.config.format}: {error}") from error

    def encode_record_prompt(self, record: str | dict[str, Any]) -> list[int]:
        """Returns the token ids before the response in a row of this record, which needs no response.

        All of a conversation is the prompt, up to where the assistant continues.

        Raises:
          BadRecord: the record has no prompt, or it cannot be encoded.
        """
        if self._chat:
            _, prompt = self._chat.prompt(get_messages(record, self.config.messages_key), get_tools(record))
            return self._prepend_start(prompt, rendered=True)
        return self._encode_text(self._prompt_text(record))

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a response: the end-of-turn token of a chat template that has one, and EOS."""
        end = self._chat and self._chat.turn_end.token_id
        return (self._eos,) if end in (None, self._eos) else (end, self._eos)

    def decode_response(self, tokens: Sequence[int]) -> str:
        """Returns the text of a response's token ids before its end, without space around it."""
        text = self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False).rstrip()
        return text.removesuffix(self.end_text).strip()

    @property
    def end_text(self) -> str:
        """What a chat template writes after an answer, up to its end-of-turn token; "" without a template."""
        return self._chat.turn_end.learned if self._chat else ""

    def _prompt_text(self, record: str | dict[str, Any]) -> str:
        """Returns the text of a prompt, without its separator."""
        prompt = get_text(record, self.columns[0])
        if self.config.format == "gsm8k_symbolic":
            prompt = prompt.strip().partition("||")[0]
        check_not_blank("prompt", prompt)
        if self.config.format == "alpaca":
            more = "" if record.get("input") is None else get_text(record, "input")
            prompt = (_ALPACA_WITH_INPUT if more.strip() else _ALPACA).format(instruction=prompt, input=more)
        return prompt

    def _response_text(self, record: str | dict[str, Any]) -> str:
        response = get_text(record, self.columns[-1])
        if self.config.format == "gsm8k_symbolic":
            _, bar, response = response.strip().partition("||")
            if not bar:
                raise BadRecord("no || between question and answer")
        check_not_blank("response", response)
        return response

    def _encode_text(self, prompt: str) -> list[int]:
        """Returns the token ids of a prompt that is a text, from position 0 to its separator."""
        rendered = is_rendered(self.tokenizer, prompt)
        tokens = self._tokenize(prompt + self.config.separator, special_tokens=rendered)
        return self._prepend_start(tokens, rendered=rendered)

    def _tokenize(self, text: str, *, special_tokens: bool = False) -> list[int]:
        """Returns the token ids of a text, without special tokens around it."""
        texts = re.findall(r"\d|\D+", text) if self.config.split_digits else [text]
        return list(itertools.chain.from_iterable(tokenize(self.tokenizer, texts, special_tokens=special_tokens)))

    def _prepend_start(self, prompt: list[int], *, rendered: bool) -> list[int]:
        if not prompt:
            raise BadRecord("the prompt has no token")
        return prepend_start(self.tokenizer, self._start, prompt, rendered=rendered)

    def _example(self, prompt: list[int], response: list[int], closed: bool = False) -> Example:
        """Returns an example; `closed`: the response ends with an end-of-turn token, learned in place of EOS."""
        if not response:
            raise BadRecord("the response has no token")
        if self._eos in response[:-1]:
            raise BadRecord("the response has an EOS before its end")
        return Example(prompt, response if closed or response[-1] == self._eos else [*response, self._eos])

    @functools.cached_property
    def _chat(self) -> ChatTemplate | None:
        messages = self.config.format == "messages"
        return ChatTemplate(self.tokenizer, self.config.chat_template) if messages else None

    @functools.cached_property
    def _start(self) -> int:
        return start_token(self.tokenizer) if self.start is None else self.start

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


def prompt_format_from_run(tokenizer: "PreTrainedTokenizerBase", recipe: Mapping[str, Any], length: int,
                           **settings: Any) -> PromptFormat:
    """Returns the prompt format of a run's examples; without a record of any, the tokenizer's chat template.

    Args:
      recipe: the settings of the run by dotted keys, {} where unknown.
      length: the most tokens the model takes.
      settings: fields of `ExampleConfig` that override the record.

    Raises:
      ConfigError: there is neither a record nor a chat template, or a setting cannot be used.
      DataError: the tokenizer has no EOS, or the chat template cannot be used.
    """
    names = [field.name for field in dataclasses.fields(ExampleConfig)]
    recorded = {name: recipe[_CONFIG_GROUP + name] for name in names if _CONFIG_GROUP + name in recipe}
    recorded["chat_template"] = None  # training stored the file's content in the tokenizer
    config = ExampleConfig(**recorded | settings)
    if config.format == "none":
        if config.chat_template is None and tokenizer.chat_template is None:
            raise ConfigError("the model has no record of a prompt format, and its tokenizer has no chat template; set "
                              "format=alpaca or another (--format), or chat_template=FILE (--chat_template)")
        config = dataclasses.replace(config, format="messages")
    if config.format != "messages" and config.chat_template is not None:
        raise ConfigError(f"a chat_template is for messages, and the format is {config.format}; remove one of them")
    if config.format == "messages" and "separator" in settings:
        raise ConfigError("a separator is not for messages, whose chat template writes the text between; remove it")
    start = start_token(tokenizer, recipe.get("data.add_bos"), recipe.get("data.packing", "concat"))
    return PromptFormat(tokenizer, config, length, start)
