"""What commands share: the model, results, checks of numbers, output that can be resumed, and processes.

When one process of a run dies, JAX's runtime aborts the others natively and none of their Python runs any more.
Therefore each process does its job in a child, whose parent says in a sentence why the child died.
"""

import argparse
import contextlib
import hashlib
import json
import os
import pathlib
import platform
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from dlm_jax.config_fields import check_at_least, check_range
from dlm_jax.errors import EXIT_FAILURE, EXIT_PEER_LOST, EXIT_SIGNAL, ConfigError

if TYPE_CHECKING:
    from dlm_jax.parallel import MeshConfig
    from dlm_jax.pipeline import DiffusionLM


def add_model_arguments(parser: argparse.ArgumentParser, *, computes: bool = True, required: bool = True) -> None:
    """Adds the arguments that `load_model` takes; a command that `computes` nothing has no --dtype=auto."""
    parser.add_argument("--model", required=required, help="a directory, a GGUF file, a hub id, a workdir[@step], or "
                        "stories: the small model that comes with the library")
    parser.add_argument("--base", metavar="MODEL",
                        help="the base of an adapter in PEFT's format, instead of the one that the adapter names")
    parser.add_argument("--mask_token", metavar="TOKEN",
                        help="an id or a token, if the model records none or to replace the one it records")
    # One decision for all commands: float16, whose range is too small for some models, is not among them.
    dtypes, meaning = ("float32", "bfloat16"), "type of the stored weights (default %(default)s)"
    if computes:
        dtypes, meaning = ("auto", *dtypes), ("type of parameters and activations (default %(default)s); auto: "
                                              "bfloat16 where this machine is faster in it")
    parser.add_argument("--dtype", choices=dtypes, default="float32", help=meaning)
    parser.add_argument("--mesh", metavar="AXIS=SIZE,...", help="split the model and the texts over all devices, as "
                        "fsdp=-1 or data=2,tensor=4; -1 takes the remaining devices (default: the first device alone)")


def load_model(arguments: argparse.Namespace, merge: bool = True) -> "DiffusionLM":
    """Opens what `--model`, `--base`, `--mask_token`, `--dtype` and `--mesh` name; `merge` as in `from_pretrained`."""
    from dlm_jax.cli.config import parse_value
    from dlm_jax.pipeline import DiffusionLM

    mask_token = None if arguments.mask_token is None else parse_value(arguments.mask_token, int | str)
    return DiffusionLM.from_pretrained(arguments.model, mask_token=mask_token, dtype=arguments.dtype,
                                       mesh=None if arguments.mesh is None else read_mesh(arguments.mesh),
                                       merge=merge, base=arguments.base)


def read_mesh(text: str) -> "MeshConfig":
    """Reads `data=2,tensor=4` as a mesh; an axis that is not named has size 1."""
    from dlm_jax.parallel import AXES, MeshConfig

    sizes = dict.fromkeys(AXES, 1)
    for item in text.split(","):
        axis, _, size = item.partition("=")
        if axis not in sizes or not size.removeprefix("-").isdecimal():
            raise ConfigError(f"--mesh={text}: {item!r} is not an axis with its size; write for example fsdp=-1 or "
                              f"data=2,tensor=4, with axes of {', '.join(AXES)}")
        sizes[axis] = int(size)
    return MeshConfig(**sizes)


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE",
                        help="also write the result to this file; -: print it instead of the table")


def write_result(destination: str | None, result: object, table: str) -> None:
    """Prints `table` for people, or `result` as JSON if `destination` is "-"; writes JSON to any other destination."""
    print(json.dumps(result, indent=1) if destination == "-" else table)
    if destination in (None, "-"):
        return
    from dlm_jax.storage import write_json

    write_json(pathlib.Path(destination), result)


def check_at_least_one(arguments: argparse.Namespace, *names: str) -> None:
    """Raises ConfigError unless every one of these flags that is given is at least 1."""
    for name in names:
        if getattr(arguments, name) is not None:
            check_at_least(getattr(arguments, name), 1, f"--{name}")


def check_seed(name: str, seed: int) -> None:
    """Raises ConfigError unless the seed fits uint32."""
    check_range(seed, 0, (1 << 32) - 1, name)


class ResumeState:
    """The lines of an output file that are `done`, so that the same command resumes; removes an incomplete last line.

      out.jsonl.partial         the lines that are done
      out.jsonl.partial.json    the settings that they were made with
      out.jsonl                 all lines, once they are done

    Raises:
      ConfigError: the lines were made with other or unknown settings.
    """

    def __init__(self, out: str, settings: dict[str, Any]):
        self._out, self._settings = out, settings
        self._path, self._settings_path = pathlib.Path(f"{out}.partial"), pathlib.Path(f"{out}.partial.json")
        content = self._path.read_bytes() if self._path.exists() else b""
        complete = content[: content.rfind(b"\n") + 1]
        if complete:
            self._check_settings()
        else:
            from dlm_jax.storage import write_json

            write_json(self._settings_path, settings)
        self._file = self._path.open("ab")
        self._file.truncate(len(complete))
        self.done = complete.count(b"\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()
        if isinstance(error, KeyboardInterrupt):
            print(f"{self.done} lines are in {self._path}; the same command resumes", file=sys.stderr)

    def add(self, lines: Sequence[dict[str, Any]]) -> None:
        self._file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
        self._file.flush()
        self.done += len(lines)

    def finish(self) -> None:
        """Makes the lines the output."""
        self._file.close()
        os.replace(self._path, self._out)
        self._settings_path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Removes the lines, once what was made of them is written."""
        self._file.close()
        self._path.unlink()
        self._settings_path.unlink(missing_ok=True)

    def _check_settings(self) -> None:
        try:
            saved = json.loads(self._settings_path.read_text())
        except (OSError, ValueError) as error:
            raise ConfigError(f"{self._settings_path}, which says how {self._path.name} was made, cannot be read; "
                              f"remove {self._path.name} to start over") from error
        changed = [f"{key}: {saved.get(key)!r} -> {self._settings.get(key)!r}" for key in {**saved, **self._settings}
                   if saved.get(key) != self._settings.get(key)]
        if changed:
            raise ConfigError(f"{self._path} was made with other settings ({'; '.join(changed)}); run the command as "
                              "it was, name another output, or remove this file to start over")


# ---- Compiled programs.

CACHE_VARIABLE = "JAX_COMPILATION_CACHE_DIR"


def keep_programs(arguments: argparse.Namespace) -> None:
    """Makes JAX keep compiled programs for the next start, in the user's cache unless JAX's own variable says where.

    Call it before JAX is imported. A run of several processes is left alone: some of them would find a program and
    others not, and the compiler of GPUs needs all of them at once.
    """
    if CACHE_VARIABLE in os.environ or getattr(arguments, "coordinator", None) is not None:
        return
    from dlm_jax.storage import cache_folder

    # Programs for a CPU use its instructions: a home directory may be shared by machines of several kinds.
    folder = cache_folder() / "programs" / hashlib.sha256(_cpu_features()).hexdigest()[:8]
    try:
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            print(f"compiled programs are kept in {folder.parent}; {CACHE_VARIABLE} names another place, or none if it "
                  "is empty", file=sys.stderr)
    except OSError:  # a machine without a home to write to compiles at each start
        return
    os.environ[CACHE_VARIABLE] = str(folder)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")


def _cpu_features() -> bytes:
    """Returns a text that is the same on machines that run the same programs."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        return platform.processor().encode()
    return b"".join(next((line for line in lines if line.startswith(name)), b"")
                    for name in (b"model name", b"flags", b"Features", b"CPU part"))


# ---- Several processes.

_PARENT_PIPE = "DLM_JAX_PARENT_PIPE"  # set in the child: a pipe that closes when its parent dies


def add_process_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("several processes, one or more per host, each started with the same command")
    group.add_argument("--coordinator", metavar="auto|HOST:PORT",
                       help="auto: detected on Cloud TPU, GKE, Slurm and Open MPI; else where process 0 listens")
    group.add_argument("--num_processes", type=int, metavar="N", help="with HOST:PORT: how many processes there are")
    group.add_argument("--process_id", type=int, metavar="I", help="with HOST:PORT: which of them this is, from 0")
    group.add_argument("--heartbeat_seconds", type=int, metavar="S",
                       help="how long a process may be silent before all others give up (default: 100)")


def is_supervisor(arguments: argparse.Namespace) -> bool:
    """Returns whether this process supervises the one that trains."""
    return arguments.coordinator is not None and _PARENT_PIPE not in os.environ


def supervise(argv: Sequence[str]) -> int:
    """Runs `dlm` with `argv` in a child, forwards signals, and returns its exit status.

    Ctrl-C reaches the child as SIGTERM, which its runtime reports to all processes, so that they stop at one step.
    """
    read_end, write_end = os.pipe()
    child = subprocess.Popen([sys.executable, "-m", "dlm_jax.cli.main", *argv], pass_fds=[read_end],
                             env=os.environ | {_PARENT_PIPE: str(read_end)}, start_new_session=True)
    os.close(read_end)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: child.send_signal(signal.SIGTERM))
    code = child.wait()
    os.close(write_end)
    if code >= 0:
        return code
    name = signal.Signals(-code).name
    if -code == signal.SIGABRT:
        print(f"dlm {argv[0]}: the runtime aborted this process, as it does when another process of the run has died "
              "or cannot be reached; start all processes again to resume from the last checkpoint", file=sys.stderr)
        return EXIT_PEER_LOST
    reason = ", perhaps because memory ran out" if name == "SIGKILL" else ""
    print(f"dlm {argv[0]}: {name} killed the process{reason}", file=sys.stderr)
    return EXIT_SIGNAL - code


def join_processes(arguments: argparse.Namespace) -> None:
    """Makes this process one of several if the arguments say so. Call it before any device is touched."""
    if arguments.coordinator is None:
        return
    from dlm_jax.parallel import initialize_distributed

    sys.excepthook = _exit_after(sys.excepthook)
    threading.Thread(target=_die_with_parent, args=[int(os.environ[_PARENT_PIPE])], daemon=True).start()
    initialize_distributed(arguments.coordinator, arguments.num_processes, arguments.process_id,
                           arguments.heartbeat_seconds)


def exit_now(code: int) -> None:
    """Ends a child that has failed without waiting for the other processes, which may be waiting for it."""
    if _PARENT_PIPE in os.environ and code in (EXIT_FAILURE, EXIT_PEER_LOST):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _die_with_parent(read_end: int) -> None:
    os.read(read_end, 1)
    os.kill(os.getpid(), signal.SIGTERM)


def _exit_after(report: Callable) -> Callable:
    """Returns an excepthook that reports an unexpected error of the main thread and then ends the process."""
    def hook(*error: object) -> None:
        report(*error)
        if threading.current_thread() is threading.main_thread():
            exit_now(EXIT_FAILURE)

    return hook
