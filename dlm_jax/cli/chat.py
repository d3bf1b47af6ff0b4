"""Talks with a fine-tuned model: what you type is formatted as its training examples were.

  dlm chat --model=runs/assistant
  dlm chat --model=runs/assistant --system="Be brief." --temperature=0.7 --stream
  dlm chat --model=runs/assistant < questions.txt > answers.txt

In a terminal, /help lists the commands. Elsewhere each line of input is a question and each line of output an answer.
"""

import argparse
import contextlib
import dataclasses
import pathlib
import sys
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, NamedTuple

from dlm_jax.cli.sample import LiveText, add_sampler_arguments, complete_settings, partial_text, sampler_settings
from dlm_jax.cli.shared import add_model_arguments, check_at_least_one, check_seed, load_model
from dlm_jax.errors import ConfigError, DataError, DLMError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dlm_jax.data.chat_template import Message
    from dlm_jax.data.prompts import Prompt, PromptFormat
    from dlm_jax.pipeline import DiffusionLM
    from dlm_jax.sampling import SamplerConfig, Snapshot

FLAGS = {"mask_token=": "--mask_token"}
FORMATS = ("prompt_response", "messages", "alpaca", "gsm8k", "gsm8k_symbolic")
PROMPT = "> "
COMMANDS = {
    "/reset": "forget the conversation",
    "/system": "with a text: set the system prompt; without: remove it",
    "/seed": "with a number: restart the randomness from that seed",
    "/help": "this list",
    "/exit": "end, as Ctrl-D does; Ctrl-C stops an answer",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--system", metavar="TEXT", help="the system prompt")
    parser.add_argument("--stream", action="store_true", help="show each denoising step in place, in a terminal")
    parser.add_argument("--max_new_tokens", type=int, default=128,
                        help="the most tokens of an answer (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0,
                        help="the same seed and questions, the same answers (default %(default)s)")
    prompt_format = parser.add_argument_group("prompt format, if its run does not record one or to replace that")
    prompt_format.add_argument("--format", choices=FORMATS,
                               help="format of the examples it was trained on, as data.examples.format")
    prompt_format.add_argument("--separator", metavar="TEXT",
                               help="between question and answer, in formats without messages")
    prompt_format.add_argument("--chat_template", metavar="FILE", help="for messages (default: the tokenizer's own)")
    add_sampler_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    check_at_least_one(arguments, "max_new_tokens")
    check_seed("--seed", arguments.seed)
    settings = sampler_settings(arguments)
    lm = load_model(arguments)
    given = {name: getattr(arguments, name) for name in ("format", "separator", "chat_template")}
    prompt_format = lm.prompt_format(**{name: value for name, value in given.items() if value is not None})
    config = complete_settings(settings, lm)
    conversation = Conversation(lm, prompt_format, config, system=arguments.system,
                                max_new_tokens=arguments.max_new_tokens, seed=arguments.seed)
    if sys.stdin.isatty() and sys.stdout.isatty():
        chat_in_terminal(conversation, stream=arguments.stream)
    else:
        for line in _input_lines():
            answer(line, conversation, stream=arguments.stream)


class Reply(NamedTuple):
    """An answer, and how many of the oldest exchanges were forgotten to make room for it."""

    text: str
    forgotten: int


class Conversation:
    """Questions and answers in turn. A model trained on messages sees all of them; any other, one question at a time.

    The n-th answer is a function of the seed, n and the conversation before it.
    """

    def __init__(self, lm: "DiffusionLM", prompt_format: "PromptFormat", config: "SamplerConfig", *,
                 max_new_tokens: int, seed: int, system: str | None = None):
        self.lm, self.prompt_format, self.config, self.max_new_tokens = lm, prompt_format, config, max_new_tokens
        self._exchanges: list[tuple[Message, Message]] = []
        self.set_system_prompt(system)
        self.reset_seed(seed)

    @property
    def has_memory(self) -> bool:
        return self.prompt_format.config.format == "messages"

    def set_system_prompt(self, system: str | None) -> None:
        """Sets or, with None, removes the system prompt.

        Raises:
          ConfigError: the model's format has no messages.
        """
        if system is not None and not self.has_memory:
            raise ConfigError("a system prompt is for messages, and this model's format is "
                              f"{self.prompt_format.config.format}; omit it")
        self._system: list[Message] = [] if system is None else [{"role": "system", "content": system}]

    def reset_seed(self, seed: int) -> None:
        """Restarts the sequence of random numbers from a seed."""
        self._seed, self._turn = seed, 0

    def forget(self) -> None:
        """Forgets all exchanges, not the system prompt."""
        self._exchanges = []

    def ask(self, text: str, on_step: "Callable[[Snapshot], object] | None" = None) -> Reply:
        """Returns the answer to `text` and adds both to the conversation; if interrupted, adds neither.

        Raises:
          DataError: the question cannot be formatted, or there is no room for an answer.
        """
        question, forgotten = self._fit(text)
        turn, self._turn = self._turn, self._turn + 1
        answer, = self.lm.respond([question], self.max_new_tokens, seed=self._seed, example_index=[turn],
                                  prompt_format=self.prompt_format, on_step=on_step, **dataclasses.asdict(self.config))
        if self.has_memory:
            exchange = {"role": "user", "content": text}, {"role": "assistant", "content": answer}
            self._exchanges = [*self._exchanges[forgotten:], exchange]
        return Reply(answer, forgotten)

    def _fit(self, text: str) -> "tuple[Prompt, int]":
        """Returns the question to ask, and how many of the oldest exchanges it omits to fit the model."""
        for forgotten in range(len(self._exchanges) + 1):
            question: Prompt = text
            if self.has_memory:
                history = [message for exchange in self._exchanges[forgotten:] for message in exchange]
                question = [*self._system, *history, {"role": "user", "content": text}]
            needed = len(self.prompt_format.encode_prompt(question)) + self.max_new_tokens
            if needed <= self.lm.config.max_length:
                return question, forgotten
        raise DataError(f"the question and {self.max_new_tokens} new tokens for its answer come to {needed} tokens, "
                        f"and the model takes at most {self.lm.config.max_length}; ask in fewer words, or lower "
                        "--max_new_tokens")


def answer(line: str, conversation: Conversation, *, stream: bool) -> None:
    """Prints the answer to `line`. In a terminal it also shows the steps, and can be interrupted between two."""
    with LiveAnswer(conversation.lm.tokenizer, conversation.prompt_format.end_token_ids, show_text=stream) as live:
        reply = conversation.ask(line, live if sys.stdout.isatty() else None)
    warn_truncated_history(reply.forgotten)
    print(reply.text, flush=True)


def warn_truncated_history(exchanges: int) -> None:
    if exchanges:
        what = "exchange was" if exchanges == 1 else f"{exchanges} exchanges were"
        print(f"(the oldest {what} forgotten, to make room)", file=sys.stderr, flush=True)


class LiveAnswer(LiveText):
    """Shows the number of the step and, with `show_text`, the first row after its prompt, up to an end token."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", end_token_ids: Collection[int], *, show_text: bool):
        super().__init__(tokenizer)
        self._ends, self._show_text, self._start = list(end_token_ids), show_text, 0

    def __call__(self, snapshot: "Snapshot") -> None:
        if snapshot.step == 0:
            self._start = int(snapshot.masked[0].argmax())
        inside = slice(self._start, int(snapshot.lengths[0]))
        tokens, masked = snapshot.tokens[0, inside], snapshot.masked[0, inside]
        ends = (~masked & [token in self._ends for token in tokens]).nonzero()[0]
        length = ends[0] if len(ends) else len(tokens)
        self.show(snapshot.step, [partial_text(self._tokenizer, tokens, masked, length)] if self._show_text else [])


def chat_in_terminal(conversation: Conversation, *, stream: bool) -> None:
    """Reads lines and commands and answers them until the user ends the conversation."""
    with contextlib.suppress(ImportError):  # Windows has none
        import readline  # noqa: F401 (`input` edits lines with it)
    name = pathlib.PurePath(conversation.lm.pretrained.source).name
    print(f"{name}, format {conversation.prompt_format.config.format}; /help for help")
    while True:
        try:
            line = input(PROMPT).strip()
            if line.startswith("/"):
                _run_command(line, conversation)
            elif line:
                answer(line, conversation, stream=stream)
        except EOFError:
            return
        except KeyboardInterrupt:
            print()
        except UnicodeDecodeError as error:
            print(f"that is not {error.encoding.upper()}", file=sys.stderr)
        except DLMError as error:
            print(error, file=sys.stderr)


def _run_command(line: str, conversation: Conversation) -> None:
    """Raises ConfigError where the command is unknown or has a bad argument, and EOFError to end."""
    command, _, text = line.partition(" ")
    text = text.strip()
    if command not in COMMANDS:
        raise ConfigError(f"there is no command {command}{did_you_mean(command, COMMANDS)}; /help lists them")
    if text and command not in ("/system", "/seed"):
        raise ConfigError(f"{command} takes no argument")
    if command == "/exit":
        raise EOFError
    if command == "/reset":
        conversation.forget()
    elif command == "/system":
        conversation.set_system_prompt(text or None)
    elif command == "/seed":
        if not text.removeprefix("-").isdecimal():
            raise ConfigError(f"/seed takes a number, not {text!r}")
        check_seed("/seed", int(text))
        conversation.reset_seed(int(text))
    else:
        width = max(map(len, COMMANDS))
        print("\n".join(f"{name:<{width}}  {help_text}" for name, help_text in COMMANDS.items()))


def _input_lines() -> Iterator[str]:
    """Yields the lines of standard input that are not blank, stripped."""
    try:
        yield from (line.strip() for line in sys.stdin if line.strip())
    except UnicodeDecodeError as error:
        raise DataError(f"standard input is not {error.encoding.upper()}; convert it") from error
