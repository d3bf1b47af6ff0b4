"""Talks with a fine-tuned model: what you type is asked as its training examples were.

  dlm chat --model=runs/assistant
  dlm chat --model=runs/assistant --system="Be brief." --temperature=0.7 --stream
  dlm chat --model=runs/assistant < questions.txt > answers.txt

In a terminal, /help lists what else can be typed. Elsewhere each line that comes in is a question, and its answer goes
out.
"""

import argparse
import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from dlm_jax.cli.sample import add_sampler_arguments, check_at_least_one, check_seed, resolve_policy, sampler_settings
from dlm_jax.cli.shared import add_model_arguments, load_model
from dlm_jax.errors import DataError

if TYPE_CHECKING:
    from dlm_jax.cli.conversation import Conversation

FORMATS = ("prompt_response", "messages", "alpaca", "gsm8k", "gsm8k_symbolic")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--system", metavar="TEXT", help="what the assistant is told before everything else")
    parser.add_argument("--stream", action="store_true", help="show each answer as it forms, in a terminal")
    parser.add_argument("--max_new_tokens", type=int, default=128,
                        help="the most tokens of an answer (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0,
                        help="the same seed and questions, the same answers (default %(default)s)")
    form = parser.add_argument_group("how the model is asked, if its run does not say or something else is wanted")
    form.add_argument("--format", choices=FORMATS, help="of the examples it learnt from, as data.examples.format")
    form.add_argument("--separator", metavar="TEXT", help="between question and answer, where there are no messages")
    form.add_argument("--chat_template", metavar="FILE", help="for messages (default: the tokenizer's own)")
    add_sampler_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    from dlm_jax.cli.conversation import Conversation

    check_at_least_one(arguments, "max_new_tokens")
    check_seed("--seed", arguments.seed)
    config = sampler_settings(arguments)
    lm = load_model(arguments)
    given = {name: getattr(arguments, name) for name in ("format", "separator", "chat_template")}
    form = lm.prompt_format(**{name: value for name, value in given.items() if value is not None})
    conversation = Conversation(lm, form, resolve_policy(config, arguments.policy, lm), system=arguments.system,
                                max_new_tokens=arguments.max_new_tokens, seed=arguments.seed)
    if sys.stdin.isatty() and sys.stdout.isatty():
        from dlm_jax.cli.chat_terminal import talk

        talk(conversation, stream=arguments.stream)
    else:
        answer_lines(conversation, stream=arguments.stream)


def answer_lines(conversation: "Conversation", *, stream: bool) -> None:
    """Prints the answer to each line of standard input."""
    from dlm_jax.cli.live import LiveAnswer

    for line in _lines():
        with (LiveAnswer(conversation.lm.tokenizer, conversation.form.end_token_ids) if stream
              else contextlib.nullcontext()) as live:
            reply = conversation.ask(line, live)
        warn_truncated_history(reply.forgotten)
        print(reply.text, flush=True)


def warn_truncated_history(exchanges: int) -> None:
    if exchanges:
        what = "exchange was" if exchanges == 1 else f"{exchanges} exchanges were"
        print(f"(the oldest {what} forgotten, to make room)", file=sys.stderr, flush=True)


def _lines() -> Iterator[str]:
    """The lines of standard input that are not blank, without space around them."""
    try:
        yield from (line.strip() for line in sys.stdin if line.strip())
    except UnicodeDecodeError as error:
        raise DataError(f"standard input is not {error.encoding.upper()}; convert it") from error
