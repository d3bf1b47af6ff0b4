"""`dlm COMMAND ...`: finds the command, reads its arguments, and turns errors into one sentence."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

from dlm_jax.cli.exit_codes import DONE, EXIT_USAGE, INTERRUPTED, REFUSED
from dlm_jax.cli.processes import exit_now
from dlm_jax.cli.quiet import keep_libraries_quiet
from dlm_jax.cli.values import hint
from dlm_jax.errors import DLMError

# Each is a module of this package with `add_arguments(parser)` and `run(arguments)`.
COMMANDS = {
    "quickstart": "the main job in a few minutes: adapt a model, measure it, sample it, export it",
    "prepare": "turn a corpus into rows of tokens, once, for training at speed",
    "train": "adapt a pretrained model to diffusion, or train an autoregressive one",
    "sample": "write text: from nothing, from a prompt, or into gaps",
    "chat": "talk with a fine-tuned model, its answers forming before your eyes if you like",
    "evaluate": "how good a model is: on tasks, beside its parent, and on held-out text",
    "export": "write a model in Hugging Face format",
    "plan": "does a recipe fit on TPUs or GPUs that are not here, and how long does it take",
}


class Parser(argparse.ArgumentParser):
    """Says what is wrong with the arguments in one sentence."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"{self.prog}: {message} (see {self.prog} --help)\n")

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """The arguments of a command, with `overrides` if it takes a recipe. A misspelt name is what is told first."""
        takes_overrides = self.get_default("overrides") is not None
        overrides, others = split_overrides(argv) if takes_overrides else ([], argv)
        known = [option for action in self._actions for option in action.option_strings]
        for argument in others:
            flag = argument.partition("=")[0]
            if flag.startswith("--") and flag not in ("--", *known):
                self.error(f"there is no argument {flag}{hint(flag, known)}")
        arguments = self.parse_args(others)
        if takes_overrides:
            arguments.overrides = overrides
        return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; see `exit_codes`."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_usage())
        return DONE
    name, *rest = argv
    if name not in COMMANDS:
        print(f"dlm: there is no command {name!r}{hint(name, COMMANDS)}; the commands are {', '.join(COMMANDS)}",
              file=sys.stderr)
        return EXIT_USAGE
    keep_libraries_quiet()
    command = importlib.import_module(f"dlm_jax.cli.{name}")
    parser = Parser(prog=f"dlm {name}", description=command.__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_arguments(parser)
    arguments = parser.parse(rest)
    arguments.argv = argv
    code = _run(name, command, arguments)
    exit_now(code)
    return code


def _run(name: str, command: ModuleType, arguments: argparse.Namespace) -> int:
    """The exit status of a command; errors become sentences."""
    try:
        code = command.run(arguments) or DONE
        sys.stdout.flush()
        return code
    except DLMError as error:
        print(f"dlm {name}: {error}", file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        print(f"dlm {name}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `| head` has seen enough
        return DONE
    except OSError as error:
        print(f"dlm {name}: {' '.join(str(error).split())}", file=sys.stderr)
        return REFUSED


def split_overrides(arguments: Sequence[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """(key, text) of every `--config.key=text`, `--config.key text` or bare `--config.switch`, and what is left."""
    overrides, others, waiting = [], [], list(arguments)
    while waiting:
        argument = waiting.pop(0)
        if not argument.startswith("--config."):
            others.append(argument)
            continue
        key, equals, text = argument.removeprefix("--config.").partition("=")
        if not equals:
            text = waiting.pop(0) if waiting and not waiting[0].startswith("--") else "true"
        overrides.append((key, text))
    return overrides, others


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {meaning}" for name, meaning in COMMANDS.items()]
    return "\n".join(["usage: dlm COMMAND [--argument=value ...]", "",
                      "Turns autoregressive language models into diffusion language models, and uses them.", "",
                      "commands:", *lines, "", "dlm COMMAND --help lists the arguments of a command."])


if __name__ == "__main__":
    sys.exit(main())
