"""A conversation in a terminal: a prompt with line editing, a few commands, and answers that can be broken off."""

import contextlib
import pathlib
import sys
from typing import TYPE_CHECKING

from tqdm import tqdm

from dlm_jax.cli.chat import warn_truncated_history
from dlm_jax.cli.live import LiveAnswer
from dlm_jax.cli.sample import check_seed
from dlm_jax.cli.values import InvalidValue, hint, read
from dlm_jax.errors import ConfigError, DLMError

if TYPE_CHECKING:
    from dlm_jax.cli.conversation import Conversation
    from dlm_jax.sampling import Snapshot

PROMPT = "> "
COMMANDS = {
    "/reset": "forget what was said, and begin anew",
    "/system": "with a text: what the assistant is told before everything else; without: nothing",
    "/seed": "with a number: draw from that seed on",
    "/help": "this list",
    "/exit": "leave, as Ctrl-D does; Ctrl-C breaks off an answer",
}


def talk(conversation: "Conversation", *, stream: bool) -> None:
    """Asks for lines and answers them until the user leaves."""
    with contextlib.suppress(ImportError):  # Windows has none
        import readline  # noqa: F401 (`input` edits lines with it)
    print(f"{pathlib.PurePath(conversation.lm.pretrained.source).name}, asked as {conversation.form.config.format}; "
          "/help for help")
    while True:
        try:
            line = input(PROMPT).strip()
            if line.startswith("/"):
                _run_command(line, conversation)
            elif line:
                _answer(line, conversation, stream=stream)
        except EOFError:
            return
        except KeyboardInterrupt:
            print()
        except UnicodeDecodeError as error:
            print(f"that is not {error.encoding.upper()}", file=sys.stderr)
        except DLMError as error:
            print(error, file=sys.stderr)


def _answer(line: str, conversation: "Conversation", *, stream: bool) -> None:
    # Watched, it runs step by step, and between two steps it can be broken off.
    lm, form = conversation.lm, conversation.form
    with LiveAnswer(lm.tokenizer, form.end_token_ids) if stream else _Bar(conversation) as on_step:
        reply = conversation.ask(line, on_step)
    warn_truncated_history(reply.forgotten)
    print(reply.text)


class _Bar:
    """An `on_step` that shows how far a slow answer has come, and on leaving takes it away again."""

    def __init__(self, conversation: "Conversation"):
        most = conversation.max_new_tokens
        self._bar = tqdm(total=min(conversation.config.steps or most, most), desc="answering", unit="step",
                         exit_now=False, delay=2)

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def __call__(self, snapshot: "Snapshot") -> None:
        self._bar.update(snapshot.step - self._bar.n)


def _run_command(line: str, conversation: "Conversation") -> None:
    """Raises ConfigError where the command is unknown or cannot be obeyed, and EOFError to leave."""
    command, _, text = line.partition(" ")
    text = text.strip()
    if command not in COMMANDS:
        raise ConfigError(f"there is no command {command}{hint(command, COMMANDS)}; /help lists them")
    if text and command not in ("/system", "/seed"):
        raise ConfigError(f"{command} stands alone")
    if command == "/exit":
        raise EOFError
    if command == "/reset":
        conversation.forget()
    elif command == "/system":
        conversation.set_system_prompt(text or None)
    elif command == "/seed":
        try:
            seed = read(text, int)
        except InvalidValue as error:
            raise ConfigError(f"/seed takes a number, not {text!r}") from error
        check_seed("/seed", seed)
        conversation.reset_seed(seed)
    else:
        width = max(map(len, COMMANDS))
        print("\n".join(f"{name:<{width}}  {meaning}" for name, meaning in COMMANDS.items()))
