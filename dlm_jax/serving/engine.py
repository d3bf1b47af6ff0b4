"""The engine: a thread that samples the rows of all requests, in batches that rows join and leave between steps.

    submit -> queue -> RunningBatch of the row's kind -> a few steps at a time -> Update -> the caller's `on_update`

Requests share the device fairly. The next row to start belongs to the request that has the fewest rows running; of
batches of different kinds, the one runs next whose rows have had the least time. A kind of row that the engine has not
seen is compiled by another thread while the rows of other kinds go on.
"""

import collections
import concurrent.futures
import dataclasses
import itertools
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np

from dlm_jax.config_fields import check_at_least
from dlm_jax.errors import ConfigError, DataError, DLMError
from dlm_jax.sampling.sampler import resolve_spec
from dlm_jax.sampling.spec import RowSettings, SamplingSpec
from dlm_jax.sampling.text import GAP
from dlm_jax.sampling.trace import Change
from dlm_jax.serving.running_batch import Programs, Row, RunningBatch, View, row_width

if TYPE_CHECKING:
    from dlm_jax.pipeline import DiffusionLM

Result = TypeVar("Result")

_SECONDS_PER_RUN = 0.04  # how long the engine stays away from queue, cancellations and other batches
_MOST_STEPS = 64  # steps per run
_MOST_KINDS = 16  # kinds of rows whose programs are kept

logger = logging.getLogger(__name__)


class QueueFull(DLMError):
    """There are too many requests; try again later."""


class EngineStopped(DLMError):
    """The engine stops, and takes no more requests."""


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

    def __init__(self, job: Job, row: Row, kind: "_Kind", request: "_Request"):
        self.job, self.row, self.kind, self.request = job, row, kind, request
        self.is_cancelled = False
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


class EngineMetrics(NamedTuple):
    """Counts since the start, and what is going on."""

    queued: int
    active: int
    slots: int
    kinds: int
    completed: int
    cancelled: int
    failed: int
    refused: int
    tokens: int
    passes: int
    busy_seconds: float


@dataclasses.dataclass(eq=False)
class _Request:
    """The rows that were submitted together."""

    number: int
    waiting: collections.deque[Ticket] = dataclasses.field(default_factory=collections.deque)
    running: int = 0


@dataclasses.dataclass(eq=False)
class _Kind:
    """Rows that can run with the same programs, in a batch for each width."""

    model: str
    programs: Programs
    drafter: str
    ready: set[tuple[int, int]] = dataclasses.field(default_factory=set)  # shapes of rows that are compiled
    compiling: set[tuple[int, int]] = dataclasses.field(default_factory=set)
    batches: dict[int, RunningBatch] = dataclasses.field(default_factory=dict)
    time: dict[int, float] = dataclasses.field(default_factory=dict)  # seconds that each row has had, by width
    step_seconds: dict[tuple[int, int], float] = dataclasses.field(default_factory=dict)  # by width and slots
    last_used: int = 0


class Engine:
    """Samples rows of one or several models.

    Args:
      models: `DiffusionLM`s by name.
      max_batch: the most rows at a time, of all models.
      max_queue: the most rows that wait.
    """

    def __init__(self, models: Mapping[str, "DiffusionLM"], *, max_batch: int = 8, max_queue: int = 256):
        check_at_least(max_batch, 1, "max_batch")
        check_at_least(max_queue, 1, "max_queue")
        self.models, self.max_batch, self.max_queue = dict(models), max_batch, max_queue
        self._lock = threading.Condition()
        self._requests: list[_Request] = []  # with rows that wait
        self._kinds: dict[tuple, _Kind] = {}
        self._calls: collections.deque[tuple[Callable, concurrent.futures.Future]] = collections.deque()
        self._numbers = itertools.count()
        self._is_stopping = self._drain = False
        self._counts: collections.Counter[str] = collections.Counter()
        self._busy_seconds = 0.0
        self._thread = threading.Thread(target=self._serve, name="engine", daemon=True)
        self._compiler = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="compiler")

    # ---- For callers, from any thread.

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self, drain: bool = True, timeout: float | None = None) -> None:
        """Refuses new jobs, finishes the others if `drain`, and ends the thread; the rest get an error.

        Args:
          timeout: the most seconds to wait; None: no limit.
        """
        with self._lock:
            self._is_stopping, self._drain = True, drain
            self._lock.notify_all()
        if self._thread.is_alive():
            self._thread.join(timeout)
            with self._lock:
                self._drain = False
            self._thread.join()
        self._compiler.shutdown(wait=False, cancel_futures=True)

    def submit(self, jobs: Sequence[Job]) -> list[Ticket]:
        """Puts jobs in the queue, all or none, and returns a ticket for each.

        Raises:
          QueueFull: too many rows wait.
          EngineStopped: the engine stops.
          ConfigError, DataError: a row cannot be sampled as it asks.
        """
        request = _Request(next(self._numbers))
        rows = [self._prepare(job) for job in jobs]
        with self._lock:
            if self._is_stopping:
                raise EngineStopped("the server is stopping; send the request again later")
            waiting = sum(len(other.waiting) for other in self._requests)
            if waiting + len(jobs) > self.max_queue:
                self._counts["refused"] += len(jobs)
                raise QueueFull(f"{waiting} texts wait already, and the queue takes {self.max_queue}; send the request "
                                "again later")
            for job, (row, spec, drafter) in zip(jobs, rows, strict=True):
                kind = self._kind(job.model, spec, drafter, row)
                request.waiting.append(Ticket(job, row, kind, request))
            tickets = list(request.waiting)
            self._requests.append(request)
            self._lock.notify_all()
        return tickets

    def call(self, function: Callable[[], Result]) -> "concurrent.futures.Future[Result]":
        """Runs a function between steps in the engine's thread, for instance one that scores a text."""
        future: concurrent.futures.Future[Result] = concurrent.futures.Future()
        with self._lock:
            if self._is_stopping:
                raise EngineStopped("the server is stopping; send the request again later")
            self._calls.append((function, future))
            self._lock.notify_all()
        return future

    def warm_up(self, jobs: Sequence[Job], progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Compiles the programs that rows like these need; call it before `start`.

        Args:
          progress: called with how many of them are ready, and of how many.
        """
        progress(0, len(jobs))
        for done, job in enumerate(jobs, 1):
            row, spec, drafter = self._prepare(job)
            with self._lock:
                kind = self._kind(job.model, spec, drafter, row)
            if row.shape not in kind.ready:
                kind.programs.compile(row, self.max_batch)
                kind.ready.add(row.shape)
            progress(done, len(jobs))

    def metrics(self) -> EngineMetrics:
        """Returns counts of rows, tokens and forward passes."""
        with self._lock:
            batches = [batch for kind in self._kinds.values() for batch in kind.batches.values()]
            return EngineMetrics(
                sum(len(request.waiting) for request in self._requests), sum(batch.num_rows for batch in batches),
                sum(len(batch.owners) for batch in batches), len(self._kinds),
                *(self._counts[name] for name in ("completed", "cancelled", "failed", "refused", "tokens", "passes")),
                self._busy_seconds)

    # ---- What a job needs.

    def _prepare(self, job: Job) -> tuple[Row, SamplingSpec, str]:
        """Returns the padded row, the spec of its programs, and the name of its drafter."""
        lm, tokens = self.models[job.model], np.asarray(job.row, np.int32)
        limit = lm.config.max_length
        if not 2 <= len(tokens) <= limit:
            raise DataError(f"the text has {len(tokens)} tokens, gaps included, and the model takes 2 to {limit}; "
                            "shorten it or ask for fewer tokens")
        if tokens[0] == GAP or not (tokens == GAP).any():
            raise DataError("the text has no gap after its first token, so there is nothing to sample")
        width, config = row_width(len(tokens), limit), job.spec.config
        padded = np.zeros(width, np.int32)
        padded[: len(tokens)] = tokens
        fixed = padded != GAP
        spec = resolve_spec(lm.model_with_drafter(config.drafter), job.spec, fixed[None],
                            np.array([len(tokens)], np.int32))
        settings = _with_neutral_numbers(RowSettings.of(config, 1), lm.config.vocab_size)
        has_prompt = config.policy == "autoregressive" or spec.diffusion.blocks is not None
        row = Row(np.where(fixed, padded, 0), fixed, len(tokens), job.seed, job.example_index, settings,
                  int(np.argmin(fixed)) if has_prompt else 0)
        structure = spec.config
        if structure.num_steps is not None:  # in the program it is only a hint; the row has the number itself
            structure = dataclasses.replace(structure, num_steps=1 << (structure.num_steps.bit_length() - 1))
        return row, dataclasses.replace(spec, config=structure, prompt_width=0), config.drafter

    def _kind(self, model: str, spec: SamplingSpec, drafter: str, row: Row) -> _Kind:
        """Returns the kind of a row; forgets the programs of the kind that has not been used for longest."""
        key = model, spec, drafter, tuple(number is None for number in row.settings)
        if key not in self._kinds:
            while len(self._kinds) >= _MOST_KINDS:
                unused = [key for key, kind in self._kinds.items() if not self._is_used(kind)]
                if not unused:
                    break
                del self._kinds[min(unused, key=lambda key: self._kinds[key].last_used)]
            lm = self.models[model]
            self._kinds[key] = _Kind(model, Programs(lm.model_with_drafter(drafter), spec, lm.mesh), drafter)
        self._kinds[key].last_used = next(self._numbers)
        return self._kinds[key]

    def _is_used(self, kind: _Kind) -> bool:
        return bool(kind.compiling) or any(batch.num_rows for batch in kind.batches.values()) or any(
            ticket.kind is kind for request in self._requests for ticket in request.waiting)

    # ---- The engine's thread.

    def _serve(self) -> None:
        while True:
            with self._lock:
                while not (self._is_stopping or self._calls or self._has_work()):
                    self._lock.wait()
                if self._is_stopping and not (self._drain and (self._requests or self._running())):
                    break
                calls = [self._calls.popleft() for _ in range(len(self._calls))]
            for function, future in calls:
                _run_call(function, future)
            self._remove_cancelled()
            self._admit()
            if not self._run_next():
                with self._lock:  # everything that waits is being compiled
                    if not self._calls and not self._is_stopping:
                        self._lock.wait(0.05)
        self._fail_all("the server stopped before the text was complete; send the request again later")

    def _has_work(self) -> bool:
        return bool(self._requests) or bool(self._running())

    def _running(self) -> list[tuple[_Kind, int]]:
        # Copies, as other threads add kinds.
        return [(kind, width) for kind in list(self._kinds.values()) for width, batch in list(kind.batches.items())
                if batch.num_rows]

    def _remove_cancelled(self) -> None:
        with self._lock:
            for request in self._requests:
                cancelled = [ticket for ticket in request.waiting if ticket.is_cancelled]
                for ticket in cancelled:
                    request.waiting.remove(ticket)
                self._counts["cancelled"] += len(cancelled)
            self._requests = [request for request in self._requests if request.waiting]
        for kind, width in self._running():
            batch = kind.batches[width]
            owners = [ticket for ticket in batch.all_owners() if ticket.is_cancelled]
            if owners:
                batch.remove(owners)
                self._end(owners, "cancelled")

    def _admit(self) -> None:
        """Moves rows from the queue into batches while there is room."""
        while sum(kind.batches[width].num_rows for kind, width in self._running()) < self.max_batch:
            with self._lock:
                ticket = self._next_ticket()
                if ticket is None:
                    return
                kind, width = ticket.kind, len(ticket.row.tokens)
                batch = kind.batches.setdefault(width, RunningBatch(kind.programs))
                together = [ticket]
                if not kind.programs.joins_midway:  # rows that cannot join later start together
                    room = self.max_batch - sum(kind.batches[width].num_rows for kind, width in self._running())
                    while len(together) < room and (other := self._next_ticket(kind, width)) is not None:
                        together.append(other)
                if batch.num_rows == 0:  # it has had no time, but may not claim all that others had before it came
                    kind.time[width] = min((one.time[other] for one, other in self._running()), default=0.0)
            try:
                batch.add([one.row for one in together], together)
            except Exception as error:
                self._fail(together, error)

    def _next_ticket(self, kind: _Kind | None = None, width: int | None = None) -> Ticket | None:
        """Takes the next row that can start from the queue, of the request with the fewest running rows."""
        for request in sorted(self._requests, key=lambda request: (request.running, request.number)):
            for ticket in request.waiting:
                if self._can_start(ticket) and kind in (None, ticket.kind) and width in (None, len(ticket.row.tokens)):
                    self._take(ticket)
                    return ticket
        return None

    def _can_start(self, ticket: Ticket) -> bool:
        """Returns whether the programs of a row are ready and its batch takes it; sees to it that they become so."""
        kind, row = ticket.kind, ticket.row
        if row.shape in kind.ready:
            return row.shape[0] not in kind.batches or kind.batches[row.shape[0]].is_open
        if row.shape not in kind.compiling:
            kind.compiling.add(row.shape)
            self._compiler.submit(self._compile, kind, row)
        return False

    def _compile(self, kind: _Kind, row: Row) -> None:
        """Compiles the programs that rows of a kind and shape need; runs in the compiler's thread."""
        error = None
        try:
            kind.programs.compile(row, self.max_batch)
        except Exception as caught:
            error = caught
        with self._lock:
            kind.compiling.remove(row.shape)
            if error is None:
                kind.ready.add(row.shape)
                self._lock.notify_all()
                return
            failed = [ticket for request in self._requests for ticket in request.waiting
                      if ticket.kind is kind and ticket.row.shape == row.shape]
            for ticket in failed:
                self._take(ticket)
        self._fail(failed, error)

    def _take(self, ticket: Ticket) -> None:
        """Takes a row from the queue."""
        ticket.request.waiting.remove(ticket)
        ticket.request.running += 1
        if not ticket.request.waiting:
            self._requests.remove(ticket.request)

    def _run_next(self) -> bool:
        """Computes a chunk of a prompt and a few steps of the batch whose rows have had the least time.

        Returns False if there is none.
        """
        running = self._running()
        if not running:
            return False
        kind, width = min(running, key=lambda one: one[0].time[one[1]])
        batch, began = kind.batches[width], time.perf_counter()
        number = batch.num_rows
        try:
            batch.prefill()
            views = self._run(kind, width) if batch.num_running else {}
        except Exception as error:
            kind.batches[width] = RunningBatch(kind.programs)
            self._fail(batch.all_owners(), error)
            return True
        seconds = time.perf_counter() - began
        kind.time[width] += seconds / number
        self._busy_seconds += seconds
        for ticket, view in views.items():
            self._counts["tokens"] += int(ticket.view.masked.sum()) - int(view.masked.sum())
            if not ticket.is_cancelled:
                _send(ticket, view)
        self._end([ticket for ticket, view in views.items() if view.is_done], "completed")
        return True

    def _run(self, kind: _Kind, width: int) -> dict[Ticket, View]:
        """Runs a batch for a few steps."""
        batch, slots = kind.batches[width], len(kind.batches[width].owners)
        seconds_per_step = kind.step_seconds.get((width, slots), _SECONDS_PER_RUN)
        steps = int(np.clip(_SECONDS_PER_RUN / seconds_per_step, 1, _MOST_STEPS))
        if any(ticket is not None and ticket.job.every_step for ticket in batch.owners):
            steps = 1
        before = {ticket: ticket.view.steps for ticket in batch.owners if ticket is not None}
        began = time.perf_counter()
        views = batch.run(steps, stop_early=bool(self._requests) or batch.num_rows > batch.num_running)
        taken = max(view.steps - before[ticket] for ticket, view in views.items())
        kind.step_seconds[width, slots] = (time.perf_counter() - began) / max(taken, 1)
        self._counts["passes"] += taken
        return views

    def _end(self, tickets: Sequence[Ticket], outcome: str) -> None:
        with self._lock:
            for ticket in tickets:
                ticket.request.running -= 1
            self._counts[outcome] += len(tickets)

    def _fail(self, tickets: Sequence[Ticket], error: Exception) -> None:
        """Ends rows with an error, which is logged."""
        if not isinstance(error, DLMError):
            logger.error("rows could not be sampled", exc_info=error)
        message = str(error) if isinstance(error, (ConfigError, DataError)) else (
            f"the server failed to sample this text ({type(error).__name__}); its log says why")
        self._end(tickets, "failed")
        for ticket in tickets:
            ticket.job.on_update(Update(ticket.view.steps, is_last=True, error=message))

    def _fail_all(self, message: str) -> None:
        with self._lock:
            tickets = [ticket for request in self._requests for ticket in request.waiting]
            self._requests = []
            calls, self._calls = list(self._calls), collections.deque()
        tickets += [ticket for kind, width in self._running() for ticket in kind.batches[width].all_owners()]
        for _, future in calls:
            future.set_exception(EngineStopped(message))
        for ticket in tickets:
            if not ticket.is_cancelled:
                ticket.job.on_update(Update(ticket.view.steps, is_last=True, error=message))


def _with_neutral_numbers(settings: RowSettings, vocab_size: int) -> RowSettings:
    """Fills in numbers that change nothing, so that rows with and without them share programs."""
    def neutral(number: np.ndarray | None, value: float, dtype: type = np.float32) -> np.ndarray:
        return np.full(1, value, dtype) if number is None else number

    return settings._replace(temperature=neutral(settings.temperature, 0), top_p=neutral(settings.top_p, 1),
                             top_k=neutral(settings.top_k, vocab_size, np.int32))


def _run_call(function: Callable[[], Result], future: "concurrent.futures.Future[Result]") -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(function())
    except BaseException as error:
        future.set_exception(error)


def _send(ticket: Ticket, view: View) -> None:
    try:
        ticket.send(view)
    except Exception as error:  # a caller's fault must not end the engine
        logger.error("an update could not be delivered", exc_info=error)
        ticket.cancel()
