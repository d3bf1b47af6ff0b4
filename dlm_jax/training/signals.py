"""Stopping when asked: the first SIGTERM or Ctrl-C lets the loop save and end, the second Ctrl-C interrupts at once."""

import contextlib
import signal
import threading
from collections.abc import Iterator

import jax

from dlm_jax.parallel import preemption_requested


class StopRequest:
    """Answers after each step whether to stop."""

    def __init__(self) -> None:
        self.name: str | None = None

    def at(self, step: int) -> str | None:
        """The name of the signal that asks to stop after this step; the same in all processes of a run."""
        if jax.process_count() > 1 and preemption_requested(step):
            self.name = "SIGTERM"
        return self.name


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """While open, notes SIGTERM and SIGINT instead of dying of them. Only a main thread can; elsewhere it is inert.

    Of several processes each leaves the signals to JAX's runtime, through which all learn of a SIGTERM that one gets.
    """
    request, before = StopRequest(), {}

    def note(number: int, frame: object) -> None:
        if request.name is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        request.name = signal.Signals(number).name

    if threading.current_thread() is threading.main_thread() and jax.process_count() == 1:
        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
