"""Stopping when asked: the first SIGTERM or Ctrl-C lets the loop save and end, the second Ctrl-C interrupts at once."""

import contextlib
import signal
import threading
from collections.abc import Iterator


class StopRequest:
    """`name` of the signal received, or None."""

    name: str | None = None


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """While open, notes SIGTERM and SIGINT instead of dying of them. Only a main thread can; elsewhere it is inert."""
    request, before = StopRequest(), {}

    def note(number: int, frame: object) -> None:
        if request.name is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        request.name = signal.Signals(number).name

    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
