"""Programs that a model wrote, run with their tests where they can do no harm, or not at all.

Each runs in a fresh Python (`-I -S`, empty environment, no input, output thrown away) inside namespaces of its own:

- no network: a network namespace without any device, not even loopback
- no files: its root holds the system's libraries and Python, read-only, and an empty working folder in memory, which
  is gone with it; the user's files are not there, and neither are /proc, /run and their sockets
- no other processes: it sees those it starts, and when it ends, or its time is over, the kernel ends them all
- no rights: no capability, no identity on the host (where root runs it: nobody), nothing that gives new rights
- limits on processor time and memory of a process, the number of processes, files, and what is in them

What it does not prevent: what a hole in the kernel lets through; reading the system's libraries under /usr and
Python's installation; sockets that network namespaces do not part (vsock in a virtual machine); several processes
together taking several times the memory of one. `processes` counts for a user that is not root on the host; in a
user namespace that root without its rights made, only time and memory are limited.

A pass is claimed by a random token that is written after the last test, so that a program which merely ends early has
not passed. One that searches the interpreter's memory for the token can claim a pass: this is no defence against a
model that was trained to cheat.
"""

import contextlib
import json
import math
import os
import pathlib
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
from typing import NamedTuple

from dlm_jax.data.records import BadRecord, get_text
from dlm_jax.errors import ConfigError
from dlm_jax.evaluation import code_jail
from dlm_jax.evaluation.items import Fields, Item

_MIB = 1 << 20
_SAID = 256  # bytes that are read of what a process says
_START = 60.0  # seconds that a busy machine may take to begin
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
    """A program and what tests it afterwards, in the same module."""

    source: str
    tests: str


class Outcome(NamedTuple):
    """Whether the tests ran to their end without an error; `reason` is "passed", the error's name, or what ended it."""

    passed: bool
    reason: str


class Sandbox:
    """Runs programs, several at a time. Whether they can be shut in is found out when it is made.

    Args:
      seconds: of processor time for each process; the program as a whole has three times as long by the clock.
      memory: bytes of address space for each process.
      disk: bytes of all its files together.
      processes: how many there may be, threads included.
      workers: programs at a time; by default as many as there are processors, 8 at most.

    Raises:
      ConfigError: a limit is not positive, or this machine cannot shut a program in.
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
        """How each of them went, in their order.

        Raises:
          ConfigError: one could not be started.
        """
        pool = ThreadPoolExecutor(self._workers)
        try:
            return list(pool.map(self._run, programs))
        finally:
            pool.shutdown(cancel_futures=True)

    def _probe(self) -> None:
        """Tries what a program must not be able to do: a server that listens here, a file that is here."""
        if sys.platform != "linux":
            raise _unable(f"{sys.platform} has no namespaces")
        with socket.create_server(("127.0.0.1", 0)) as server, tempfile.NamedTemporaryFile() as file:
            port = server.getsockname()[1]
            outcome = self._run(Program(_PROBE.format(port=port, file=file.name), ""))
        if not outcome.passed:
            raise _unable("a trial reached this machine's network or files" if outcome.reason == "SystemError"
                          else f"a trial ended with {outcome.reason}")

    def _run(self, program: Program) -> Outcome:
        begun, passed = (secrets.token_hex(16) for _ in range(2))
        receiving, sending = os.pipe()
        try:
            with tempfile.TemporaryDirectory(prefix="dlm-sandbox-") as folder:
                job = {**self._limits, "program": program.source, "tests": program.tests, "begun": begun,
                       "passed": passed}
                pathlib.Path(folder, code_jail.JOB_FILE).write_text(json.dumps(job), encoding="utf-8")
                process = subprocess.Popen(
                    [sys.executable, "-I", "-S", code_jail.__file__, folder, str(sending)], env={}, cwd="/",
                    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                    pass_fds=(sending,), start_new_session=True)
                try:
                    os.close(sending)
                    sending = None
                    said, ended = _listen(receiving, _START, most=len(begun) - 1)
                    if said.startswith(begun.encode()):
                        more, ended = _listen(receiving, self._patience)
                        said += more
                finally:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                _listen(receiving, 5.0, most=1 << 17)  # more than a pipe holds: until all that could write are gone
        finally:
            os.close(receiving)
            if sending is not None:
                os.close(sending)
        return self._outcome(said, begun, passed, ended)

    def _outcome(self, said: bytes, begun: str, passed: str, ended: bool) -> Outcome:
        text = said.decode(errors="replace")
        if not text.startswith(begun):
            raise _unable(text[:_SAID] or ("it ended before it began" if ended else f"not begun after {_START:g} s"))
        rest = text.removeprefix(begun)
        if not ended:
            return Outcome(False, f"not done after {self._patience:g} s")
        if rest == passed:
            return Outcome(True, "passed")
        return Outcome(False, rest.replace(passed, "")[:80] or "ended before its tests did")


def _listen(descriptor: int, seconds: float, most: int = _SAID) -> tuple[bytes, bool]:
    """What comes, up to `most` bytes, and whether it came to its end within the time."""
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
    return ConfigError(f"programs that a model wrote cannot be shut in here ({reason}), so they are not run; leave out "
                       "the tasks that run them, or use Linux 5.12 or later where user namespaces or root's rights are "
                       "allowed")


# ---- Programs with a gap: HumanEval's in-filling tasks (Bavarian et al., arXiv 2207.14255).


# By how the names of the rows begin, how many tokens a gap may have; the longer the gaps, the fewer lengths are tried.
_LENGTHS = {"SingleLine": None, "MultiLine": range(16, 241, 16), "RandomSpan": range(4, 97, 4)}


def humaneval_infilling(fields: Fields, release: bool) -> Item:
    """{task_id, prompt, suffix, canonical_solution, test, entry_point}, for a line, several lines or a random span.

    The released script of the parents asks for "the middle code" with prefix and suffix in the prompt.
    """
    kind = get_text(fields, "task_id").partition("Infilling")[0]
    if kind not in _LENGTHS:
        raise BadRecord(f"the task_id {fields['task_id']!r} does not begin with {', '.join(_LENGTHS)}")
    prompt, suffix = get_text(fields, "prompt"), get_text(fields, "suffix")
    asked = f"The prefix is: {prompt} and the suffix is: {suffix}, please return the middle code: " if release else ""
    return Item(prompt=prompt, suffix=suffix, parent_prompt=asked, solution=get_text(fields, "canonical_solution"),
                tests=f"{get_text(fields, 'test')}\ncheck({get_text(fields, 'entry_point')})\n",
                one_line=kind == "SingleLine", lengths=_LENGTHS[kind])


def completed(item: Item, text: str) -> Program:
    """The program with `text` in its gap, and its tests."""
    return Program(item.prompt + text + item.suffix, item.tests)


def cut_code(item: Item, text: str) -> str:
    """What of a text that was written from left to right stands in the gap.

    Of a gap that is a line it is the first line that is not blank; of others it ends where the first line behind the
    gap comes.
    """
    if not item.one_line:
        behind = next((line for line in item.suffix.split("\n") if line.strip()), None)
        return text.partition(behind)[0] if behind else text
    lines = text.split("\n")
    first = next((number for number, line in enumerate(lines) if line.strip()), 0)
    return "\n".join(lines[: first + 1]) + "\n"
