"""What has been said to a model, and the next answer to it."""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from dlm_jax.errors import ConfigError, DataError

if TYPE_CHECKING:
    from dlm_jax.data.prompts import Message, PromptFormat, Question
    from dlm_jax.pipeline import DiffusionLM
    from dlm_jax.sampling import SamplerConfig, Snapshot


class Reply(NamedTuple):
    """An answer, and how many of the oldest exchanges were forgotten to make room for it."""

    text: str
    forgotten: int


class Conversation:
    """Questions and answers in turn. Where the model knows messages, all of them are what it is asked; where it knows
    single questions, each stands on its own.

    The n-th answer is a function of the seed, n and what was said before.
    """

    def __init__(self, lm: "DiffusionLM", form: "PromptFormat", config: "SamplerConfig", *, max_new_tokens: int,
                 seed: int, system: str | None = None):
        self.lm, self.form, self.config, self.max_new_tokens = lm, form, config, max_new_tokens
        self._exchanges: list[tuple[Message, Message]] = []
        self._system: list[Message] = []
        self.set_system_prompt(system)
        self.reset_seed(seed)

    @property
    def has_memory(self) -> bool:
        return self.form.config.format == "messages"

    def set_system_prompt(self, system: str | None) -> None:
        """Sets what the assistant is told before everything else; nothing for None.

        Raises:
          ConfigError: the model knows single questions only.
        """
        if system is not None and not self.has_memory:
            raise ConfigError(f"a system text is for messages, and this model is asked as {self.form.config.format}; "
                              "leave it out")
        self._system = [] if system is None else [{"role": "system", "content": system}]

    def reset_seed(self, seed: int) -> None:
        """Begins the sequence of random numbers of a seed."""
        self._seed, self._turn = seed, 0

    def forget(self) -> None:
        """Forgets what was said, but for the system text."""
        self._exchanges = []

    def ask(self, text: str, on_step: "Callable[[Snapshot], None] | None" = None) -> Reply:
        """The answer to `text`, after which both are part of the conversation; if interrupted, neither is.

        Raises:
          DataError: it cannot be asked, or leaves no room for an answer.
        """
        question, forgotten = self._fitting(text)
        turn, self._turn = self._turn, self._turn + 1
        answer, = self.lm.respond([question], self.max_new_tokens, seed=self._seed, example_index=[turn],
                                  form=self.form, on_step=on_step, **dataclasses.asdict(self.config))
        if self.has_memory:
            exchange = {"role": "user", "content": text}, {"role": "assistant", "content": answer}
            self._exchanges = [*self._exchanges[forgotten:], exchange]
        return Reply(answer, forgotten)

    def _fitting(self, text: str) -> "tuple[Question, int]":
        """What is asked, and how many of the oldest exchanges it leaves out to fit the model."""
        for forgotten in range(len(self._exchanges) + 1):
            question: Question = text
            if self.has_memory:
                said = [message for exchange in self._exchanges[forgotten:] for message in exchange]
                question = [*self._system, *said, {"role": "user", "content": text}]
            needed = len(self.form.ask(question)) + self.max_new_tokens
            if needed <= self.lm.config.max_length:
                return question, forgotten
        raise DataError(f"the question and {self.max_new_tokens} new tokens for its answer come to {needed} tokens, "
                        f"and the model takes at most {self.lm.config.max_length}; ask in fewer words, or lower "
                        "--max_new_tokens")
