"""The rows that wait: what a caller asks for, what it hears, and which row starts next."""

import collections
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from dlm_jax.errors import DLMError
from dlm_jax.sampling.spec import SamplingSpec
from dlm_jax.sampling.text import GAP
from dlm_jax.sampling.trace import Change
from dlm_jax.serving.running_batch import Row, View

if TYPE_CHECKING:
    from dlm_jax.serving.engine import Kind


class QueueFull(DLMError):
    """There are too many requests; try again later."""


@dataclasses.dataclass(frozen=True)
class Update:
    """What happened to a row since its last update.

    Attributes:
      step: forward passes of this row so far.
      changes: tokens that were revealed, replaced, or masked again, in order of positions.
      is_last: no update follows; the row is complete unless there is an error.
      error: a sentence, if the row cannot be completed.
    """

    step: int
    changes: list[Change] = dataclasses.field(default_factory=list)
    is_last: bool = False
    error: str | None = None


@dataclasses.dataclass(frozen=True)
class Job:
    """A row to fill.

    Attributes:
      model: a name in `Engine.models`.
      row: token ids, and GAP where a token is to be sampled; position 0 is given.
      spec: policy, token choice, and what ends a text.
      seed, example_index: determine the random numbers, as in `DiffusionLM.generate`.
      on_update: called in the engine's thread, in order; it must not block.
      every_step: one update for each forward pass; otherwise an update may cover several.
    """

    model: str
    row: Sequence[int]
    spec: SamplingSpec
    on_update: Callable[[Update], None]
    seed: int = 0
    example_index: int = 0
    every_step: bool = False


class Ticket:
    """A submitted job."""

    def __init__(self, job: Job, row: Row, kind: "Kind"):
        self.job, self.row, self.kind = job, row, kind
        self.is_cancelled = False
        self.request: _Request | None = None
        self.view = View(row.tokens, ~row.fixed & (np.arange(len(row.tokens)) < row.length),
                         np.zeros(len(row.tokens), np.float32), 0, False)

    def cancel(self) -> None:
        """Stops the row at the next step; no update follows."""
        self.is_cancelled = True

    def send(self, view: View) -> None:
        """Sends an update with what has changed."""
        old, self.view = self.view, view
        other = (view.tokens != old.tokens) | (view.log_probs != old.log_probs)
        changed = (view.masked != old.masked) | (~view.masked & other)
        changes = [Change(view.steps, int(i), GAP, 0.0) if view.masked[i] else
                   Change(view.steps, int(i), int(view.tokens[i]), float(view.log_probs[i]))
                   for i in np.flatnonzero(changed)]
        self.job.on_update(Update(view.steps, changes, is_last=view.is_done))

    def send_error(self, message: str) -> None:
        """Sends the last update, of a row that is not complete."""
        self.job.on_update(Update(self.view.steps, is_last=True, error=message))


@dataclasses.dataclass(eq=False)
class _Request:
    """The rows that were submitted together: those that wait, how many run, and when it had its last turn."""

    turn: int
    waiting: collections.deque[Ticket]
    running: int = 0


class JobQueue:
    """Rows that wait, at most `max_rows`. The engine's lock protects it."""

    def __init__(self, max_rows: int):
        self.max_rows, self._turns = max_rows, itertools.count()
        self._requests: list[_Request] = []

    def __len__(self) -> int:
        return sum(len(request.waiting) for request in self._requests)

    def __iter__(self) -> Iterator[Ticket]:
        return iter([ticket for request in self._requests for ticket in request.waiting])

    def check_room(self, number: int) -> None:
        """Raises QueueFull unless there is room for so many rows."""
        if len(self) + number > self.max_rows:
            raise QueueFull(f"{len(self)} texts wait already, and the queue takes {self.max_rows}; send the request "
                            "again later")

    def put(self, tickets: Sequence[Ticket]) -> None:
        """Adds the rows of a request."""
        request = _Request(next(self._turns), collections.deque(tickets))
        for ticket in tickets:
            ticket.request = request
        self._requests.append(request)

    def take_next(self, can_start: Callable[[Ticket], bool]) -> Ticket | None:
        """Takes the next row that can start.

        It is one of the request that has the fewest rows running, and of equals one that has waited longest for a turn.
        """
        for request in sorted(self._requests, key=lambda request: (request.running, request.turn)):
            for ticket in request.waiting:
                if can_start(ticket):
                    request.turn = next(self._turns)
                    self._take(ticket)
                    return ticket
        return None

    def take_all(self, condition: Callable[[Ticket], bool]) -> list[Ticket]:
        """Takes all rows with which `condition` holds."""
        taken = [ticket for ticket in self if condition(ticket)]
        for ticket in taken:
            self._take(ticket)
        return taken

    def end(self, ticket: Ticket) -> None:
        """Counts a row that was taken as no longer running."""
        ticket.request.running -= 1

    def _take(self, ticket: Ticket) -> None:
        ticket.request.waiting.remove(ticket)
        ticket.request.running += 1
        if not ticket.request.waiting:
            self._requests.remove(ticket.request)
