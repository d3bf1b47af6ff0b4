"""Where the time of a run goes, over all its starts."""

import contextlib
import time
from collections.abc import Iterator, Mapping

# What a run can be doing. Only "steps" is what it is there for; "lost" was spent on steps after the last checkpoint.
KINDS = ("start", "compiling", "steps", "data", "validation", "saving", "sampling", "lost")
_TRAINING = ("steps", "data")


class Clock:
    """Adds up seconds by kind, and counts steps and scored tokens between records."""

    def __init__(self) -> None:
        self.spent = dict.fromkeys(KINDS, 0.0)
        self._kind, self._since = "start", time.monotonic()
        self._begin_lap()

    def add(self, spent: Mapping[str, float]) -> None:
        """Counts in what starts before have spent, as `state` gave it."""
        for kind, seconds in spent.items():
            self.spent[kind] += seconds
        self._begin_lap()

    @contextlib.contextmanager
    def doing(self, kind: str) -> Iterator[None]:
        """Time inside counts as `kind`."""
        before = self._kind
        self.switch(kind)
        yield
        self.switch(before)

    def switch(self, kind: str) -> None:
        """From now on time counts as `kind`."""
        now = time.monotonic()
        self.spent[self._kind] += now - self._since
        self._kind, self._since = kind, now

    def count(self, scored: float) -> None:
        """A step's results are here."""
        self.switch(self._kind)
        now = self._training()
        self._steps, self._scored = self._steps + 1, self._scored + scored
        self._slowest, self._last = max(self._slowest, now - self._last), now

    def lap(self) -> dict[str, float]:
        """Since the last lap: `steps`, `scored` tokens, `seconds` of training, of which `waiting` for data, and those
        of the `slowest` step."""
        self.switch(self._kind)
        lap = {"steps": self._steps, "scored": self._scored, "seconds": max(self._training() - self._began, 1e-9),
               "waiting": self.spent["data"] - self._waited, "slowest": self._slowest}
        self._begin_lap()
        return lap

    def state(self) -> dict[str, float]:
        self.switch(self._kind)
        return dict(self.spent)

    def goodput(self) -> float:
        """The share of all time that went into steps that count."""
        spent = self.state()
        return spent["steps"] / max(sum(spent.values()), 1e-9)

    def line(self) -> str:
        """For people: the shares of all kinds that took at least a thousandth."""
        spent = self.state()
        total = max(sum(spent.values()), 1e-9)
        shares = sorted(((seconds / total, kind) for kind, seconds in spent.items()), reverse=True)
        return ", ".join(f"{kind} {share:.1%}" for share, kind in shares if share >= 1e-3)

    def _training(self) -> float:
        return sum(self.spent[kind] for kind in _TRAINING)

    def _begin_lap(self) -> None:
        self._steps, self._scored, self._slowest = 0, 0.0, 0.0
        self._began = self._last = self._training()
        self._waited = self.spent["data"]
