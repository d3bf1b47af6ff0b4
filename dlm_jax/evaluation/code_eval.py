"""Runs generated programs with their tests under bubblewrap (`bwrap`), or refuses.

Each program runs in a new Python (`-I -S`, empty environment) in namespaces of its own: no network, no other processes,
no capabilities, the system's and Python's files read-only, one empty folder in memory, and none of the user's files.
Limits hold for processor time, memory, processes, and the size of files.

It does not prevent exploits of kernel bugs. A pass is a random token that is written after the last test, so a program
that exits early has not passed; one that searches the interpreter's memory for the token can fake a pass. This does not
stop a model that was trained to cheat.
"""

import contextlib
import json
import math
import os
import pathlib
import resource
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from dlm_jax.errors import ConfigError

_MIB = 1 << 20
_SAID = 256  # bytes of an answer, more is not read
_RUNNER = """
import json, os, sys, types
job = json.load(sys.stdin)
answer = os.fdopen(os.dup(1), "w")
null = os.open("/dev/null", os.O_RDWR)
for descriptor in (0, 1, 2):
    os.dup2(null, descriptor)
module = sys.modules["__main__"] = types.ModuleType("__main__")
try:
    exec(compile(job["source"] + "\\n" + job["tests"], "program", "exec"), module.__dict__)
except BaseException as error:
    said = type(error).__name__
else:
    said = job["passed"]
answer.write(said)
answer.flush()
os._exit(0)
"""
_PROBE = """
import os, socket
for attempt in (lambda: socket.create_connection(("127.0.0.1", {port}), 2), lambda: os.stat({file!r})):
    try:
        attempt()
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
      seconds: processor time per process; the program has three times as much wall-clock time.
      memory: bytes of address space per process.
      disk: bytes of its folder, which is in memory.
      processes: number of processes, threads included; it does not hold where root runs the sandbox.
      workers: programs at a time; by default the number of CPUs, at most 8.

    Raises:
      ConfigError: a limit is not positive, or this machine cannot isolate a program.
    """

    def __init__(self, *, seconds: float = 5.0, memory: int = 512 * _MIB, disk: int = 16 * _MIB, processes: int = 16,
                 workers: int | None = None):
        if not (0 < seconds < math.inf and min(memory, disk, processes) > 0):
            raise ConfigError("the limits of a sandbox must be positive")
        found = shutil.which("bwrap")
        if found is None:
            raise _unable("the program bwrap is not installed; it is in the package bubblewrap")
        self._command = _command(found, disk)
        self._limits = {resource.RLIMIT_CPU: math.ceil(seconds), resource.RLIMIT_AS: memory,
                        resource.RLIMIT_FSIZE: disk, resource.RLIMIT_NPROC: processes, resource.RLIMIT_CORE: 0}
        self._patience = 3 * seconds
        self._workers = workers or min(os.cpu_count() or 1, 8)
        self._probe()

    def __call__(self, programs: Sequence[Program]) -> list[Outcome]:
        """Returns the outcome of each program, in order."""
        pool = ThreadPoolExecutor(self._workers)
        try:
            return list(pool.map(self._run, programs))
        finally:
            pool.shutdown(cancel_futures=True)

    def compute(self, references: Sequence[str], predictions: Sequence[Sequence[str]],
                k: Sequence[int] = (1, 10, 100)) -> tuple[dict[str, float], list[list[Outcome]]]:
        """Returns pass@k over problems, as `evaluate.load("code_eval")` of Hugging Face does (arXiv 2107.03374, eq. 1).

        Args:
          references: the tests of each problem.
          predictions: the programs of each problem.
        """
        jobs = [Program(source, tests) for tests, sources in zip(references, predictions, strict=True)
                for source in sources]
        found = iter(self(jobs))
        outcomes = [[next(found) for _ in sources] for sources in predictions]
        counts = [(len(tried), sum(outcome.passed for outcome in tried)) for tried in outcomes]
        return {f"pass@{size}": math.fsum(pass_at_k(n, right, size) for n, right in counts) / len(counts)
                for size in k if all(n >= size for n, _ in counts)}, outcomes

    def _probe(self) -> None:
        """Runs a program that tries to reach a local server and a local file, which must both fail."""
        with socket.create_server(("127.0.0.1", 0)) as server, tempfile.NamedTemporaryFile(dir=os.getcwd()) as file:
            outcome = self._run(Program(_PROBE.format(port=server.getsockname()[1], file=file.name), ""))
        if not outcome.passed:
            raise _unable("a trial reached this machine's network or files" if outcome.reason == "SystemError"
                          else f"a trial ended with {outcome.reason}")

    def _run(self, program: Program) -> Outcome:
        passed = secrets.token_hex(16)
        job = json.dumps({**program._asdict(), "passed": passed})
        # Limits are set inside: bwrap itself needs more.
        process = subprocess.Popen(self._limited(), env={}, cwd="/", stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, start_new_session=True)
        try:
            said, errors = process.communicate(job.encode(), self._patience + 10)
        except subprocess.TimeoutExpired:
            process.kill()  # the kernel ends whatever runs in its namespaces
            process.communicate()
            return Outcome(False, f"not done after {self._patience:g} s")
        text = said[:_SAID].decode(errors="replace")
        if text == passed:
            return Outcome(True, "passed")
        reason = text.replace(passed, "")[:80] or errors[:_SAID].decode(errors="replace").strip()
        if not reason and process.returncode > 128:
            reason = f"ended by signal {process.returncode - 128}"
        return Outcome(False, reason or "ended before its tests did")

    def _limited(self) -> list[str]:
        names = {resource.RLIMIT_CPU: "cpu", resource.RLIMIT_AS: "as", resource.RLIMIT_FSIZE: "fsize",
                 resource.RLIMIT_NPROC: "nproc", resource.RLIMIT_CORE: "core"}
        limits = [f"--{names[key]}={value}" for key, value in self._limits.items()]
        return [*self._command, "timeout", "-s", "KILL", f"{self._patience:g}", "prlimit", *limits,
                sys._base_executable, "-I", "-S", "-c", _RUNNER]


def pass_at_k(number: int, right: int, k: int) -> float:
    """Returns the probability that one of k programs, drawn from `number` of which some are right, is right."""
    if number - right < k:
        return 1.0
    return 1.0 - math.prod((number - right - i) / (number - i) for i in range(k))


@contextlib.contextmanager
def used_as_code_eval(sandbox: Any) -> Iterator[None]:
    """Makes `evaluate.load("code_eval")` return the sandbox: tasks of lm-eval that run programs then run them in it.

    Args:
      sandbox: has `compute` as `Sandbox` has.
    """
    import evaluate

    load = evaluate.load

    def load_in_sandbox(path: str, *arguments: Any, **settings: Any) -> Any:
        return sandbox if path == "code_eval" else load(path, *arguments, **settings)

    evaluate.load = load_in_sandbox
    try:
        yield
    finally:
        evaluate.load = load


def _command(bwrap: str, disk: int) -> list[str]:
    """Returns the start of a command that runs the rest in namespaces of its own, with Python's files read-only."""
    files = []
    for name in ("/usr", "/lib", "/lib64", "/bin"):
        path = pathlib.Path(name)
        if path.is_symlink():
            files += ["--symlink", os.readlink(path), name]
        elif path.exists():
            files += ["--ro-bind", name, name]
    if not sys.base_prefix.startswith("/usr"):  # not a virtual environment's own folder, which may be among the user's
        files += ["--ro-bind", sys.base_prefix, sys.base_prefix]
    return [bwrap, "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL", "--clearenv", *files,
            "--setenv", "PATH", "/usr/bin:/bin", "--proc", "/proc", "--dev", "/dev", "--size", str(disk), "--tmpfs",
            "/tmp", "--chdir", "/tmp", "--"]


def _unable(reason: str) -> ConfigError:
    return ConfigError(f"generated programs cannot be isolated here ({reason}), so they are not run; install "
                       "bubblewrap, or leave out the tasks that run programs")
