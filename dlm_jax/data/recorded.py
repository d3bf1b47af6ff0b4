"""How a model is asked: as the examples were written that it learnt from, which the record of its run tells."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dlm_jax.data.config import ExampleConfig
from dlm_jax.data.examples import ExampleForm
from dlm_jax.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_GROUP = "data.examples."


def recorded_form(tokenizer: "PreTrainedTokenizerBase", recipe: Mapping[str, Any], length: int,
                  **settings: Any) -> ExampleForm:
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
    return ExampleForm(tokenizer, config, length)
