"""One of several processes: the work is done in a child, whose parent says in a sentence why it died.

When one process of a run dies, JAX's runtime aborts the others natively: no Python of theirs runs any more.
"""

import argparse
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence

from dlm_jax.cli.exit_codes import KILLED, PEER_LOST, REFUSED

_PARENT_PIPE = "DLM_JAX_LIFELINE"  # set in the child: a pipe that closes when its parent dies


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("several processes, one or more a host, each started with the same command")
    group.add_argument("--coordinator", metavar="auto|HOST:PORT",
                       help="auto: found by itself on Cloud TPU, GKE, Slurm and Open MPI; else where process 0 listens")
    group.add_argument("--num_processes", type=int, metavar="N", help="with HOST:PORT: how many processes there are")
    group.add_argument("--process_id", type=int, metavar="I", help="with HOST:PORT: which of them this is, from 0")
    group.add_argument("--heartbeat_seconds", type=int, metavar="S",
                       help="how long a process may be silent before all others give up (default: 100)")


def supervises(arguments: argparse.Namespace) -> bool:
    """Whether this process is to watch over the one that does the work."""
    return arguments.coordinator is not None and _PARENT_PIPE not in os.environ


def supervise(argv: Sequence[str]) -> int:
    """Runs `dlm` with `argv` in a child, passes signals on, and gives its exit status.

    Ctrl-C reaches the child as SIGTERM, of which its runtime tells all processes, so that they stop at the same step.
    """
    lifeline, end = os.pipe()
    child = subprocess.Popen([sys.executable, "-m", "dlm_jax.cli.main", *argv], pass_fds=[lifeline],
                             env=os.environ | {_PARENT_PIPE: str(lifeline)}, start_new_session=True)
    os.close(lifeline)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: child.send_signal(signal.SIGTERM))
    code = child.wait()
    os.close(end)
    if code >= 0:
        return code
    name = signal.Signals(-code).name
    if -code == signal.SIGABRT:
        print(f"dlm {argv[0]}: this process was aborted by the runtime, as it is when another process of the run has "
              "died or cannot be reached; start all processes again, and the run goes on from its last checkpoint",
              file=sys.stderr)
        return PEER_LOST
    print(f"dlm {argv[0]}: the process was killed by {name}" + (", perhaps for want of memory" if name == "SIGKILL"
                                                              else ""), file=sys.stderr)
    return KILLED - code


def join(arguments: argparse.Namespace) -> None:
    """Makes this process one of several, if that is what was asked for. To be called before any device is touched."""
    if arguments.coordinator is None:
        return
    from dlm_jax.parallel import initialize_distributed

    sys.excepthook = _leave_after(sys.excepthook)
    threading.Thread(target=_die_with_parent, args=[int(os.environ[_PARENT_PIPE])], daemon=True).start()
    initialize_distributed(arguments.coordinator, arguments.num_processes, arguments.process_id, arguments.heartbeat_seconds)


def exit_now(code: int) -> None:
    """Ends a process that has failed without waiting for the others, which may be waiting for it."""
    if _PARENT_PIPE in os.environ and code in (REFUSED, PEER_LOST):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _die_with_parent(lifeline: int) -> None:
    os.read(lifeline, 1)
    os.kill(os.getpid(), signal.SIGTERM)


def _leave_after(report: Callable) -> Callable:
    """A trace of what nobody foresaw, then the end."""
    def hook(*error: object) -> None:
        report(*error)
        if threading.current_thread() is threading.main_thread():
            exit_now(REFUSED)

    return hook
