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
from dlm_jax.serving.queue import Job, JobQueue, QueueFull, Ticket
from dlm_jax.serving.running_batch import Programs, Row, RunningBatch, View, row_width

if TYPE_CHECKING:
    from dlm_jax.pipeline import DiffusionLM

Result = TypeVar("Result")

_SECONDS_PER_RUN = 0.04  # how long the engine stays away from queue, cancellations and other batches
_MOST_STEPS = 64  # steps per run
_MOST_KINDS = 16  # kinds of rows whose programs are kept

logger = logging.getLogger(__name__)


class EngineStopped(DLMError):
    """The engine stops, and takes no more requests."""


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
class Kind:
    """Rows that can run with the same programs, in a batch for each width."""

    programs: Programs
    ready: dict[tuple[int, int], int] = dataclasses.field(default_factory=dict)  # compiled slots, by shape of a row
    compiling: set[tuple[int, int]] = dataclasses.field(default_factory=set)
    batches: dict[int, RunningBatch] = dataclasses.field(default_factory=dict)  # by width
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
        self.models, self.max_batch = dict(models), max_batch
        self._lock = threading.Condition()
        self._queue = JobQueue(max_queue)
        self._kinds: dict[tuple, Kind] = {}
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
        rows = [self._prepare(job) for job in jobs]
        with self._lock:
            self._check_running()
            try:
                self._queue.check_room(len(jobs))
            except QueueFull:
                self._counts["refused"] += len(jobs)
                raise
            tickets = [Ticket(job, row, self._kind(job.model, spec, row))
                       for job, (row, spec) in zip(jobs, rows, strict=True)]
            self._queue.put(tickets)
            self._lock.notify_all()
        return tickets

    def call(self, function: Callable[[], Result]) -> "concurrent.futures.Future[Result]":
        """Runs a function between steps in the engine's thread, for instance one that scores a text."""
        future: concurrent.futures.Future[Result] = concurrent.futures.Future()
        with self._lock:
            self._check_running()
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
            row, spec = self._prepare(job)
            with self._lock:
                kind = self._kind(job.model, spec, row)
            self._compile(kind, row)
            progress(done, len(jobs))

    def metrics(self) -> EngineMetrics:
        """Returns counts of rows, tokens and forward passes."""
        with self._lock:
            running, names = self._running(), ("completed", "cancelled", "failed", "refused", "tokens", "passes")
            return EngineMetrics(
                queued=len(self._queue), active=sum(batch.num_rows for batch in running),
                slots=sum(len(batch.owners) for batch in running), kinds=len(self._kinds),
                busy_seconds=self._busy_seconds, **{name: self._counts[name] for name in names})

    def _check_running(self) -> None:
        if self._is_stopping:
            raise EngineStopped("the server is stopping; send the request again later")

    # ---- What a job needs.

    def _prepare(self, job: Job) -> tuple[Row, SamplingSpec]:
        """Returns the padded row and the spec of its programs."""
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
        has_prompt = config.policy == "autoregressive" or spec.blocks is not None
        row = Row(np.where(fixed, padded, 0), fixed, len(tokens), job.seed, job.example_index, settings,
                  int(np.argmin(fixed)) if has_prompt else 0)
        structure = spec.config
        if structure.num_steps is not None:  # in the program it is only a hint; the row has the number itself
            structure = dataclasses.replace(structure, num_steps=1 << (structure.num_steps.bit_length() - 1))
        return row, dataclasses.replace(spec, config=structure, prompt_width=0)

    def _kind(self, model: str, spec: SamplingSpec, row: Row) -> Kind:
        """Returns the kind of a row; forgets the programs of the kind that has not been used for longest."""
        key = model, spec, tuple(number is None for number in row.settings)
        if key not in self._kinds:
            while len(self._kinds) >= _MOST_KINDS:
                unused = [key for key, kind in self._kinds.items() if not self._is_used(kind)]
                if not unused:
                    break
                del self._kinds[min(unused, key=lambda key: self._kinds[key].last_used)]
            lm = self.models[model]
            network = lm.model_with_drafter(spec.config.drafter)
            self._kinds[key] = Kind(Programs(network, spec, self.max_batch, lm.mesh))
        self._kinds[key].last_used = next(self._numbers)
        return self._kinds[key]

    def _is_used(self, kind: Kind) -> bool:
        return bool(kind.compiling) or any(batch.num_rows for batch in kind.batches.values()) or any(
            ticket.kind is kind for ticket in self._queue)

    # ---- The engine's thread.

    def _serve(self) -> None:
        while True:
            with self._lock:
                while not (self._is_stopping or self._calls or self._has_work()):
                    self._lock.wait()
                if self._is_stopping and not (self._drain and self._has_work()):
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
        return len(self._queue) > 0 or bool(self._running())

    def _running(self) -> list[RunningBatch]:
        # Copies, as other threads add kinds.
        return [batch for kind in list(self._kinds.values()) for batch in list(kind.batches.values()) if batch.num_rows]

    def _remove_cancelled(self) -> None:
        with self._lock:
            cancelled = self._queue.take_all(lambda ticket: ticket.is_cancelled)
        self._end(cancelled, "cancelled")
        for batch in self._running():
            owners = [ticket for ticket in batch.all_owners() if ticket.is_cancelled]
            if owners:
                batch.remove(owners)
                self._end(owners, "cancelled")

    def _admit(self) -> None:
        """Moves rows from the queue into batches while there is room."""
        while (room := self.max_batch - sum(batch.num_rows for batch in self._running())) > 0:
            with self._lock:
                ticket = self._queue.take_next(self._can_start)
                if ticket is None:
                    return
                kind = ticket.kind
                batch = kind.batches.setdefault(len(ticket.row.tokens), RunningBatch(kind.programs))
                together = [ticket] if kind.programs.joins_midway else self._take_like(ticket, room)
                if batch.num_rows == 0:  # it has had no time, but may not claim all that others had before it came
                    batch.time = min((other.time for other in self._running()), default=0.0)
            try:
                batch.add([one.row for one in together], together)
            except Exception as error:
                self._fail(together, error)

    def _can_start(self, ticket: Ticket) -> bool:
        """Returns whether a row's programs are ready and its batch takes it; has them compiled if they are not."""
        kind, shape = ticket.kind, ticket.row.shape
        if shape not in kind.compiling and kind.ready.get(shape) != kind.programs.sizes[-1]:
            kind.compiling.add(shape)
            self._compiler.submit(self._compile_for_queue, kind, ticket.row)
        batch = kind.batches.get(shape[0])
        return self._has_slots(ticket, 0 if batch is None else batch.num_rows) and (batch is None or batch.is_open)

    @staticmethod
    def _has_slots(ticket: Ticket, num_others: int) -> bool:
        """Returns whether the programs for so many other rows and this one are ready."""
        slots = ticket.kind.programs.slots_for(num_others + 1)
        return ticket.kind.ready.get(ticket.row.shape, 0) >= slots

    def _take_like(self, ticket: Ticket, room: int) -> list[Ticket]:
        """Returns a row and those that wait and can start together with it, since they cannot join it later."""
        together = [ticket]
        while len(together) < room:
            other = self._queue.take_next(
                lambda other: other.kind is ticket.kind and other.row.shape == ticket.row.shape
                and self._has_slots(other, len(together)))
            if other is None:
                break
            together.append(other)
        return together

    def _compile(self, kind: Kind, row: Row) -> None:
        """Compiles the programs that rows of a kind and shape need, few slots first."""
        for slots in kind.programs.sizes:
            kind.programs.compile(row, slots)
            with self._lock:
                kind.ready[row.shape] = slots
                self._lock.notify_all()

    def _compile_for_queue(self, kind: Kind, row: Row) -> None:
        """Does what `_compile` does, in the compiler's thread; if it fails, so do the rows that wait for it."""
        error, failed = None, []
        try:
            self._compile(kind, row)
        except Exception as caught:
            error = caught
        with self._lock:
            kind.compiling.remove(row.shape)
            if error is not None:
                failed = self._queue.take_all(lambda ticket: ticket.kind is kind and ticket.row.shape == row.shape)
        if error is not None:
            self._fail(failed, error)

    def _run_next(self) -> bool:
        """Computes a chunk of a prompt and a few steps of the batch whose rows have had the least time.

        Returns False if there is none.
        """
        running = self._running()
        if not running:
            return False
        batch, began = min(running, key=lambda batch: batch.time), time.perf_counter()
        number = batch.num_rows
        try:
            batch.prefill()
            views = self._run(batch) if batch.num_running else {}
        except Exception as error:
            failed = batch.all_owners()
            batch.clear()
            self._fail(failed, error)
            return True
        seconds = time.perf_counter() - began
        batch.time += seconds / number
        self._busy_seconds += seconds
        for ticket, view in views.items():
            self._counts["tokens"] += int(ticket.view.masked.sum()) - int(view.masked.sum())
            if not ticket.is_cancelled:
                _send(ticket, view)
        self._end([ticket for ticket, view in views.items() if view.is_done], "completed")
        return True

    def _run(self, batch: RunningBatch) -> dict[Ticket, View]:
        """Runs a batch for a few steps."""
        slots = len(batch.owners)
        steps = int(np.clip(_SECONDS_PER_RUN / batch.step_seconds.get(slots, _SECONDS_PER_RUN), 1, _MOST_STEPS))
        tickets = [ticket for ticket in batch.owners if ticket is not None]
        if any(ticket.job.every_step or ticket.view.steps == 0 for ticket in tickets):  # a first token comes at once
            steps = 1
        before = {ticket: ticket.view.steps for ticket in tickets}
        began = time.perf_counter()
        views = batch.run(steps, stop_early=len(self._queue) > 0 or batch.num_rows > batch.num_running)
        taken = max(view.steps - before[ticket] for ticket, view in views.items())
        batch.step_seconds[slots] = (time.perf_counter() - began) / max(taken, 1)
        self._counts["passes"] += taken
        return views

    def _end(self, tickets: Sequence[Ticket], outcome: str) -> None:
        with self._lock:
            for ticket in tickets:
                self._queue.end(ticket)
            self._counts[outcome] += len(tickets)

    def _fail(self, tickets: Sequence[Ticket], error: Exception) -> None:
        """Ends rows with an error, which is logged."""
        if not isinstance(error, DLMError):
            logger.error("rows could not be sampled", exc_info=error)
        message = str(error) if isinstance(error, (ConfigError, DataError)) else (
            f"the server failed to sample this text ({type(error).__name__}); its log says why")
        self._end(tickets, "failed")
        for ticket in tickets:
            ticket.send_error(message)

    def _fail_all(self, message: str) -> None:
        with self._lock:
            tickets = self._queue.take_all(lambda ticket: True)
            calls, self._calls = list(self._calls), collections.deque()
        tickets += [ticket for batch in self._running() for ticket in batch.all_owners()]
        for _, future in calls:
            future.set_exception(EngineStopped(message))
        for ticket in tickets:
            if not ticket.is_cancelled:
                ticket.send_error(message)


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
