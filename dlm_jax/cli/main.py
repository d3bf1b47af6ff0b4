"""`dlm COMMAND ...`: finds the command, reads its arguments, checks their paths, and turns errors into one sentence.

Nothing heavy is imported before the paths are checked. The modules of the commands import it in their functions.
"""

import argparse
import gc
import importlib
import logging
import os
import platform
import re
import sys
import threading
import traceback
import warnings
from collections.abc import Mapping, Sequence
from types import ModuleType, TracebackType
from typing import NoReturn

from dlm_jax import __version__
from dlm_jax.cli.paths import check_paths
from dlm_jax.cli.shared import exit_now, keep_programs
from dlm_jax.errors import EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_OK, EXIT_USAGE, DLMError, did_you_mean

# Each is a module of this package with `add_arguments(parser)` and `run(arguments)`, and perhaps FLAGS: from the names
# that errors of the library have for settings to the command's own.
COMMANDS = {
    "quickstart": "the main job in a few minutes: adapt a model, measure it, sample it, export it",
    "prepare": "turn a corpus into rows of tokens, once, for training at speed",
    "train": "adapt a pretrained model to diffusion, or train an autoregressive one",
    "sample": "generate text: from nothing, from a prompt, or into gaps",
    "chat": "talk with a fine-tuned model",
    "serve": "serve a model over HTTP, in OpenAI's protocol, with a page to try it",
    "evaluate": "measure a model: on tasks, against its parent, and on held-out text",
    "export": "write a model in Hugging Face format, or a drafter for inference engines",
    "plan": "does a recipe fit on TPUs or GPUs that are not here, and how long does it take",
}
# Flags of the version before: refused, with the new name.
OLD_FLAGS = {"--grid": "--step_schedule", "--guidance": "--cfg_scale", "--refresh_every": "--cache_refresh_interval",
             "--advise": "--suggest", "--harness": "--tasks", "--harness_dir": "--include_path",
             "--lm_eval": "--tasks", "--lm_eval_dir": "--include_path", "--shots": "--num_fewshot",
             "--estimator": "--mc_estimator", "--num_samples": "--num_masks"}
_QUIET = {"TF_CPP_MIN_LOG_LEVEL": "2", "TRANSFORMERS_VERBOSITY": "error", "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
          "TOKENIZERS_PARALLELISM": "true"}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status, one of `EXIT_...` in `dlm_jax.errors`."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_usage())
        return EXIT_OK
    if argv[0] == "--version":
        print(f"dlm_jax {__version__}, Python {platform.python_version()}")
        return EXIT_OK
    name, *rest = argv
    if name not in COMMANDS:
        print(f"dlm: there is no command {name!r}{did_you_mean(name, COMMANDS)}; the commands are "
              f"{', '.join(COMMANDS)}", file=sys.stderr)
        return EXIT_USAGE
    _silence_libraries()
    command = importlib.import_module(f"dlm_jax.cli.{name}")
    parser = Parser(prog=f"dlm {name}", description=command.__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_arguments(parser)
    arguments = parser.parse(rest)
    arguments.argv = argv
    code = _run(name, command, arguments)
    exit_now(code)
    return code


def run_and_exit() -> NoReturn:
    """Runs the command of the command line."""
    code = main()
    gc.freeze()  # the interpreter's last collections would take half a second to visit the objects of JAX
    sys.exit(code)


class Parser(argparse.ArgumentParser):
    """Says in one sentence what is wrong with the arguments."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"{self.prog}: {message}; see {self.prog} --help\n")

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Returns a command's arguments, with `overrides` if it takes a recipe; reports misspelt names first."""
        takes_overrides = self.get_default("overrides") is not None
        overrides, others = split_overrides(argv) if takes_overrides else ([], argv)
        known = [option for action in self._actions for option in action.option_strings]
        for argument in others:
            flag = argument.partition("=")[0]
            if OLD_FLAGS.get(flag) in known:
                self.error(f"{flag} is now {OLD_FLAGS[flag]}; write that instead")
            if flag.startswith("--") and flag not in ("--", *known):
                self.error(f"there is no argument {flag}{did_you_mean(flag, known)}")
        arguments = self.parse_args(others)
        if takes_overrides:
            arguments.overrides = overrides
        return arguments


def split_overrides(arguments: Sequence[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """Returns (key, text) of every `--config.key=text`, `--config.key text` or bare `--config.key`, and the rest."""
    overrides, others, remaining = [], [], list(arguments)
    while remaining:
        argument = remaining.pop(0)
        if not argument.startswith("--config."):
            others.append(argument)
            continue
        key, equals, text = argument.removeprefix("--config.").partition("=")
        if not equals:
            text = remaining.pop(0) if remaining and not remaining[0].startswith("--") else "true"
        overrides.append((key, text))
    return overrides, others


def _run(name: str, command: ModuleType, arguments: argparse.Namespace) -> int:
    """Returns the exit status of a command; errors become sentences."""
    try:
        check_paths(arguments)
        keep_programs(arguments)
        code = command.run(arguments) or EXIT_OK
        sys.stdout.flush()
        return code
    except DLMError as error:
        print(f"dlm {name}: {in_flags(str(error), getattr(command, 'FLAGS', {}))}", file=sys.stderr)
        return EXIT_FAILURE
    except KeyboardInterrupt:
        print(f"dlm {name}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader, such as `head`, has closed it
        return EXIT_OK
    except OSError as error:
        reason = " ".join(str(error).split())
        if error.filename is not None and error.strerror:
            reason = f"{error.filename} cannot be used ({error.strerror}); name another path, or mend this one"
        print(f"dlm {name}: {reason}", file=sys.stderr)
        return EXIT_FAILURE
    except RuntimeError as error:
        if not str(error).startswith("RESOURCE_EXHAUSTED"):  # what JAX raises where an array does not fit
            raise
        found = re.search(r"allocating (\d+) bytes", str(error))
        asked = f" for {int(found[1]) / 2**30:.1f} GiB at once" if found else ""
        remedy = "--config.data.batch_size, or raise --config.optimizer.accumulate_steps" if name == "train" else (
            "the number of texts at a time, such as --batch_size")
        print(f"dlm {name}: the device has no memory left{asked}; lower {remedy}", file=sys.stderr)
        return EXIT_FAILURE


def in_flags(message: str, flags: Mapping[str, str]) -> str:
    """Returns an error in the terms of the command that was typed, such as --length for data.length."""
    for key, flag in flags.items():
        message = re.sub(rf"(?<![\w.]){re.escape(key)}(?!\.?\w)", flag, message)
    return message


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {help_text}" for name, help_text in COMMANDS.items()]
    return "\n".join(["usage: dlm COMMAND [--argument=value ...]", "",
                      "Turns autoregressive language models into diffusion language models, and uses them.", "",
                      "commands:", *lines, "",
                      "dlm COMMAND --help lists the arguments of a command, dlm --version the version."])


def _silence_libraries() -> None:
    """Turns off what libraries log about themselves. Call it before they are imported."""
    for variable, value in _QUIET.items():
        os.environ.setdefault(variable, value)
    logging.getLogger("jax._src.xla_bridge").setLevel(logging.ERROR)
    # A failed checkpoint write fails in many threads at once, each with a trace; `CheckpointWriter` reports it once.
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # A program that another process is writing at this moment is compiled instead.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache entry")
    sys.excepthook, threading.excepthook = _print_trace, lambda failed: _print_trace(*failed[:3])


def _print_trace(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
    """Prints the usual trace, except for errors of Orbax's threads that write in the background."""
    files = {frame.filename for frame in traceback.extract_tb(trace)}
    writing = any("orbax" in file for file in files) and threading.current_thread() is not threading.main_thread()
    if not writing and str(error) != "Event loop is closed":  # tensorstore's callbacks after the end raise this
        sys.__excepthook__(kind, error, trace)


if __name__ == "__main__":
    run_and_exit()
