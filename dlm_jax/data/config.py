"""What a corpus is, and how it becomes rows."""

import dataclasses
import math
import typing
from typing import Literal

from dlm_jax.errors import ConfigError


def _field(default: object, meaning: str) -> object:
    return dataclasses.field(default=default, metadata={"help": meaning})


def _check_choices(config: object, group: str) -> None:
    """Raises ConfigError where a field that is a choice has another value."""
    for name, kind in typing.get_type_hints(type(config)).items():
        choices = typing.get_args(kind) if typing.get_origin(kind) is Literal else ()
        if choices and getattr(config, name) not in choices:
            raise ConfigError(f"{group}.{name} is {getattr(config, name)!r}; it must be one of {', '.join(choices)}")


@dataclasses.dataclass(frozen=True)
class ExampleConfig:
    """How records of prompts and responses become rows, one example a row. The prompt is never noised."""

    format: Literal["none", "prompt_response", "messages", "alpaca", "gsm8k", "gsm8k_symbolic"] = _field(
        "none", "what a record is; none: running text")
    prompt_key: str = _field("prompt", "the key of the prompt, for prompt_response")
    response_key: str = _field("response", "the key of the response, for prompt_response")
    messages_key: str = _field("messages", "the key of the list of {role, content}, for messages")
    chat_template: str | None = _field(None, "a file with a chat template, for messages; None: the tokenizer's own")
    separator: str = _field("\n", "text between prompt and response; messages need none")
    split_digits: bool = _field(
        False, "every digit is a token of its own, as in the fine-tuning of DiffuGPT-M; not for messages")
    train_on_padding: bool = _field(
        True, "true: padding is noised and learned, as in the DiffuLLaMA reference implementation, so that the model knows "
              "where an answer ends in more room than it needs; false: one EOS is learned and padding is masked, which is "
              "enough for an autoregressive model")
    pad_token: str | None = _field(None, "what fills a row; None: the tokenizer's padding token, else EOS")
    overlong: Literal["error", "truncate", "drop"] = _field(
        "error", "examples longer than a row: an error, a response cut off at the end, or left out and counted")

    def __post_init__(self) -> None:
        _check_choices(self, "data.examples")
        if self.split_digits and self.format == "messages":
            raise ConfigError("data.examples.split_digits is not for messages, which their chat template writes")


@dataclasses.dataclass(frozen=True)
class RowsConfig:
    """How the records of a corpus become rows of tokens."""

    text_key: str = _field("text", "the key of the text in records")
    document_separator: str = _field("", "what parts a .txt file into documents; empty: the file is one document")
    length: int = _field(512, "tokens a row")
    packing: Literal["concat", "document_mask"] = _field(
        "concat", "concat: documents run on, EOS between; document_mask: each document sees only itself")
    add_bos: bool | None = _field(
        None, "BOS before each document; None: as the tokenizer does, and always with document_mask")
    on_bad_record: Literal["raise", "skip"] = _field(
        "raise", "records that cannot be read: an error, or reported, counted and left out")
    examples: ExampleConfig = _field(ExampleConfig(), "fine-tuning on prompts and responses instead of running text")
    validation_fraction: float = _field(0.01, "share of the documents held out, if no validation text is given")

    def __post_init__(self) -> None:
        _check_choices(self, "data")
        if self.length < 2:
            raise ConfigError(f"data.length is {self.length}; a row needs a context token and one more")
        if not 0 <= self.validation_fraction < 1:
            raise ConfigError(f"data.validation_fraction is {self.validation_fraction}, not in [0, 1)")


@dataclasses.dataclass(frozen=True)
class DataConfig(RowsConfig):
    """A corpus for training: raw text, prepared rows, or a mixture of several."""

    train: tuple[str, ...] = _field(
        (), "what to train on: files or globs of text, directories made by `dlm prepare`, tfds:NAME, hf:NAME")
    weights: tuple[float, ...] = _field(
        (), "share of each entry of train in the rows; empty: each as large as it is")
    validation: tuple[str, ...] = _field(
        (), "held-out text of the same kinds; empty: what was held out of the training text")
    batch_size: int = _field(256, "rows a step, over all devices and accumulation")
    random_length: float = _field(0.0, "share of the rows that are cut to a random length")
    cache_dir: str | None = _field(
        None, "where the rows made from raw text are kept; None: in the working directory")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size < 1:
            raise ConfigError(f"data.batch_size is {self.batch_size}; it must be at least 1")
        if not 0 <= self.random_length <= 1:
            raise ConfigError(f"data.random_length is {self.random_length}, not in [0, 1]")
        if self.weights and len(self.weights) != len(self.train):
            raise ConfigError(f"data.weights has {len(self.weights)} numbers for the {len(self.train)} entries of "
                              "data.train")
        if any(not (math.isfinite(weight) and weight > 0) for weight in self.weights):
            raise ConfigError(f"data.weights must be positive numbers, got {self.weights}")
