"""The configuration of a corpus and of how its records become rows."""

import dataclasses
import math
from typing import Literal

from dlm_jax.config_fields import check_at_least, check_choices, check_range, field, open_field, settle
from dlm_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class ExampleConfig:
    """How records of prompts and responses become rows, one example per row. The prompt is never noised."""

    format: Literal["none", "prompt_response", "messages", "alpaca", "gsm8k", "gsm8k_symbolic"] = field(
        "none", "what a record holds; none: running text")
    prompt_key: str = field("prompt", "the key of the prompt, for prompt_response")
    response_key: str = field("response", "the key of the response, for prompt_response")
    messages_key: str = field("messages", "the key of the list of {role, content}, for messages")
    chat_template: str | None = field(None, "a file with a chat template, for messages; None: the tokenizer's own")
    separator: str = field("\n", "text between prompt and response; not for messages")
    split_digits: bool = field(
        False, "each digit is one token, as in the fine-tuning of DiffuGPT-M; not for messages")
    train_on_padding: bool = field(
        True, "true: padding is noised and learned, as in the DiffuLLaMA reference implementation, so that the model "
              "learns where an answer ends; false: one EOS is learned and padding is masked, which is enough for an "
              "autoregressive model")
    pad_token: str | None = field(None, "the padding token; None: the tokenizer's padding token, else EOS")
    overlong: Literal["error", "truncate", "drop"] = field(
        "error", "for examples longer than a row: raise an error, cut the response, or drop and count the example")

    def __post_init__(self) -> None:
        check_choices(self, "data.examples")
        if self.split_digits and self.format == "messages":
            raise ConfigError("data.examples.split_digits does not apply to messages; set it to false")


@dataclasses.dataclass(frozen=True)
class OpenExamples(ExampleConfig):
    """Examples as a recipe says them, which may leave to the source how it was prompted."""

    separator: str | None = open_field(ExampleConfig, "separator")
    split_digits: bool | None = open_field(ExampleConfig, "split_digits")


@dataclasses.dataclass(frozen=True)
class RowsConfig:
    """How the records of a corpus become rows of tokens."""

    text_key: str = field("text", "the key of the text in records")
    document_separator: str = field("", "text between the documents of a .txt file; empty: the file is one document")
    length: int = field(512, "tokens per row")
    packing: Literal["concat", "document_mask"] = field(
        "concat", "concat: documents are concatenated, with EOS between them; document_mask: the same, but each "
                  "document attends to itself alone")
    add_bos: bool | None = field(
        None, "BOS before each document; None: as the tokenizer does, and always with document_mask")
    on_bad_record: Literal["raise", "skip"] = field(
        "raise", "for records that cannot be read: raise an error, or report, count and skip them")
    examples: ExampleConfig = field(ExampleConfig(), "fine-tuning on prompts and responses instead of running text")
    validation_fraction: float = field(0.01, "share of the documents held out, if no validation text is given")

    def __post_init__(self) -> None:
        check_choices(self, "data")
        check_at_least(self.length, 2, "data.length")
        check_range(self.validation_fraction, 0, 1, "data.validation_fraction", open_high=True)


@dataclasses.dataclass(frozen=True)
class DataConfig(RowsConfig):
    """A corpus for training: raw text, prepared rows, or a mixture of several."""

    train: tuple[str, ...] = field(
        (), "what to train on: files or globs of text, directories made by `dlm prepare`, tfds:NAME, hf:NAME")
    weights: tuple[float, ...] = field(
        (), "share of each entry of train in the rows; empty: in proportion to its size")
    validation: tuple[str, ...] = field(
        (), "validation text of the same kinds; empty: the documents held out of the training text")
    examples: OpenExamples = field(OpenExamples(), "fine-tuning on prompts and responses instead of running text")
    batch_size: int = field(256, "rows per step, over all devices and micro-batches")
    random_length: float = field(0.0, "share of the rows that are cut to a random length")
    cache_dir: str | None = field(
        None, "where the rows made from raw text are kept; None: in the working directory")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self.batch_size, 1, "data.batch_size")
        check_range(self.random_length, 0, 1, "data.random_length")
        if self.weights and len(self.weights) != len(self.train):
            raise ConfigError(f"data.weights has {len(self.weights)} numbers for the {len(self.train)} entries of "
                              "data.train")
        if any(not (math.isfinite(weight) and weight > 0) for weight in self.weights):
            raise ConfigError(f"data.weights must be positive numbers, got {self.weights}")

    def rows_config(self, validation_fraction: float | None = None) -> RowsConfig:
        """Returns the settings that decide the rows.

        Args:
          validation_fraction: in place of the configured one; None: that, or 0 where validation text is given.
        """
        values = {key.name: getattr(self, key.name) for key in dataclasses.fields(RowsConfig)}
        if validation_fraction is None:
            validation_fraction = 0.0 if self.validation else self.validation_fraction
        return RowsConfig(**values | {"validation_fraction": validation_fraction,
                                      "examples": settle(self.examples, ExampleConfig, {})})
