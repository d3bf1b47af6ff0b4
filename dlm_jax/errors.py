"""Errors that reach the user as one sentence (what is wrong, where, what to do), and the exit statuses of `dlm`."""

import difflib
from collections.abc import Iterable


class DLMError(Exception):
    """Base of every error dlm_jax raises on purpose; the command line prints its message without a trace."""


class ConfigError(DLMError):
    """A setting is unknown, has the wrong type, or contradicts another."""


class CheckpointError(DLMError):
    """A checkpoint is missing, unreadable, or does not fit the model."""


class DataError(DLMError):
    """A corpus, tokenizer or batch is missing, empty, corrupt, or does not fit the model."""


class TrainingError(DLMError):
    """Training cannot go on, for instance because the loss is not a number."""


# Exit statuses of `dlm`, for the scripts that start it.
EXIT_OK = 0
EXIT_FAILURE = 1  # refused or failed, with a sentence on stderr: the same command would fail again
EXIT_USAGE = 2  # wrong arguments
EXIT_DOES_NOT_FIT = 3  # `dlm plan`: the recipe does not fit
EXIT_STOPPED = 75  # by SIGTERM, everything saved: the same command resumes
EXIT_PEER_LOST = 76  # another process of the run died: start all of them again to resume
EXIT_SIGNAL = 128  # plus the number of the signal that killed the process
EXIT_INTERRUPTED = 130  # by Ctrl-C


def did_you_mean(word: str, candidates: Iterable[str], prefix: str = "") -> str:
    """Returns ` (did you mean X?)`, X `prefix` with the candidate closest to `word`, or an empty string."""
    match = difflib.get_close_matches(word, list(candidates), n=1)
    return f" (did you mean {prefix}{match[0]}?)" if match else ""
