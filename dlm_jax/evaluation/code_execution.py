"""Runs generated programs with their tests in a sandbox, or refuses; and HumanEval's infilling items.

Each program runs in a new Python (`-I -S`, empty environment, no input or output) in namespaces of its own:

- no network: a network namespace without devices, not even loopback
- no files: its root has the system's libraries and Python, read-only, and an empty working folder in memory, which is
  deleted with it; the user's files, /proc, /run and their sockets are absent
- no other processes: it sees only those it starts, and the kernel kills them all when it ends or its time is over
- no privileges: no capabilities, no identity on the host (nobody, if root runs it), no way to gain new ones
- limits on CPU time and memory per process, on the number of processes, and on the number and size of files

It does not prevent: exploits of kernel bugs; reading the system's libraries under /usr and Python's installation;
sockets that network namespaces do not separate (vsock in a virtual machine); several processes together using several
times the memory of one. `processes` applies to a user that is not root on the host; in a user namespace made by a root
without its privileges, only time and memory are limited.

A pass is a random token that is written after the last test, so that a program which exits early has not passed. A
program that searches the interpreter's memory for the token can fake a pass: this does not stop a model that was
trained to cheat.

The infilling tasks are those of Bavarian et al. (arXiv 2207.14255).
"""

import contextlib
import json
import math
import os
import pathlib
import re
import secrets
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

from dlm_jax.errors import ConfigError
from dlm_jax.evaluation import code_jail

if TYPE_CHECKING:  # a sandbox imports nothing but the standard library
    from dlm_jax.evaluation.items import Item

_MIB = 1 << 20
_SAID = 256  # bytes read from a process
_START = 60.0  # seconds that a busy machine may need to start
_PROBE = """
import os, socket
for connect in (lambda: socket.create_connection(("127.0.0.1", {port}), 2), lambda: os.stat({file!r})):
    try:
        connect()
    except OSError:
        pass
    else:
        raise SystemError
"""


class Program(NamedTuple):
    """A program, and its tests, which run after it in the same module."""

    source: str
    tests: str


class Outcome(NamedTuple):
    """Whether all tests ran without an error; `reason` is "passed", the error's name, or what ended the program."""

    passed: bool
    reason: str


class Sandbox:
    """Runs programs, several at a time. Its constructor tests whether this machine can isolate them.

    Args:
      seconds: CPU time per process; the program has three times as much wall-clock time.
      memory: bytes of address space per process.
      disk: bytes of all files together.
      processes: number of processes, threads included.
      workers: programs at a time; by default the number of CPUs, at most 8.

    Raises:
      ConfigError: a limit is not positive, or this machine cannot isolate a program.
    """

    def __init__(self, *, seconds: float = 5.0, memory: int = 512 * _MIB, disk: int = 16 * _MIB, processes: int = 16,
                 workers: int | None = None):
        if not (0 < seconds < math.inf and min(memory, disk, processes) > 0):
            raise ConfigError("the limits of a sandbox must be positive")
        self._limits = {"seconds": math.ceil(seconds), "memory": memory, "disk": disk, "processes": processes}
        self._patience = 3 * seconds
        self._workers = workers or min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1, 8)
        self._probe()

    def __call__(self, programs: Sequence[Program]) -> list[Outcome]:
        """Returns the outcome of each program, in order.

        Raises:
          ConfigError: a program could not be started.
        """
        pool = ThreadPoolExecutor(self._workers)
        try:
            return list(pool.map(self._run, programs))
        finally:
            pool.shutdown(cancel_futures=True)

    def _probe(self) -> None:
        """Runs a program that tries to reach a local server and a local file, which must both fail."""
        if sys.platform != "linux":
            raise _unable(f"{sys.platform} has no namespaces")
        with socket.create_server(("127.0.0.1", 0)) as server, tempfile.NamedTemporaryFile() as file:
            port = server.getsockname()[1]
            outcome = self._run(Program(_PROBE.format(port=port, file=file.name), ""))
        if not outcome.passed:
            raise _unable("a trial reached this machine's network or files" if outcome.reason == "SystemError"
                          else f"a trial ended with {outcome.reason}")

    def _run(self, program: Program) -> Outcome:
        start_token, passed = (secrets.token_hex(16) for _ in range(2))
        receiving, sending = os.pipe()
        try:
            with tempfile.TemporaryDirectory(prefix="dlm-sandbox-") as folder:
                job = {**self._limits, "program": program.source, "tests": program.tests, "start_token": start_token,
                       "passed": passed}
                pathlib.Path(folder, code_jail.JOB_FILE).write_text(json.dumps(job), encoding="utf-8")
                process = subprocess.Popen(
                    [sys.executable, "-I", "-S", code_jail.__file__, folder, str(sending)], env={}, cwd="/",
                    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                    pass_fds=(sending,), start_new_session=True)
                try:
                    os.close(sending)
                    sending = None
                    said, ended = _listen(receiving, _START, most=len(start_token) - 1)
                    if said.startswith(start_token.encode()):
                        more, ended = _listen(receiving, self._patience)
                        said += more
                finally:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                _listen(receiving, 5.0, most=1 << 17)  # more than a pipe holds: until no writer remains
        finally:
            os.close(receiving)
            if sending is not None:
                os.close(sending)
        return self._outcome(said, start_token, passed, ended)

    def _outcome(self, said: bytes, start_token: str, passed: str, ended: bool) -> Outcome:
        text = said.decode(errors="replace")
        if not text.startswith(start_token):
            raise _unable(text[:_SAID] or ("it ended before its start" if ended else f"no start after {_START:g} s"))
        rest = text.removeprefix(start_token)
        if not ended:
            return Outcome(False, f"not done after {self._patience:g} s")
        if rest == passed:
            return Outcome(True, "passed")
        return Outcome(False, rest.replace(passed, "")[:80] or "ended before its tests did")


def completed(item: "Item", text: str) -> Program:
    """Returns the program with `text` in its gap, and its tests."""
    return Program(item.prompt + text + item.suffix, item.tests)


def truncate_code(item: "Item", text: str) -> str:
    """Returns the prefix of an autoregressive model's text that fills the gap.

    A gap of one line takes the first line that is not blank. Another gap ends before the first line that equals the
    one after the gap, or, if it ends within a line, before the first end of a line that equals the end of its own.
    """
    if not item.one_line:
        next_line = next((line.rstrip() for line in item.suffix.split("\n") if line.strip()), None)
        if next_line is None:
            return text
        line_start = "^" if item.solution.endswith("\n") else ""
        found = re.search(rf"{line_start}{re.escape(next_line)}[ \t\r]*$", text, re.MULTILINE)
        return text[: found.start()] if found else text
    lines = text.split("\n")
    first = next((number for number, line in enumerate(lines) if line.strip()), 0)
    return "\n".join(lines[: first + 1]) + "\n"


def _listen(descriptor: int, seconds: float, most: int = _SAID) -> tuple[bytes, bool]:
    """Returns up to `most` bytes, and whether the end of the stream was reached in time."""
    said, deadline = b"", time.monotonic() + seconds
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    while len(said) <= most:
        left = deadline - time.monotonic()
        if left <= 0 or not poll.poll(1000 * left):
            return said, False
        chunk = os.read(descriptor, _SAID)
        if not chunk:
            break
        said += chunk
    return said, True


def _unable(reason: str) -> ConfigError:
    return ConfigError(f"generated programs cannot be isolated here ({reason}), so they are not run; leave out the "
                       "tasks that run them, or use Linux 5.12 or later with user namespaces or root privileges")
