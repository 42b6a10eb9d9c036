"""Which worker takes which span, and how to react to failures: a state machine, without Ray.

Spans are numbers, in the order in which to begin them; workers are any keys. Events come in with
the time (seconds of any clock that does not jump), decisions come out. An event costs O(1), or
O(log n) with spans that wait for another try; `tick`, `overdue`, and events after every span has
begun cost O(workers). Memory is O(workers) and two bytes per span.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Policy:
    """Limits of patience with spans and workers.

    Attributes:
        attempts: failed tries before a span is given up.
        backoff: seconds before a failed span is tried again; four times as many after each try.
        patience: the fewest seconds without progress until a worker counts as hanging.
        slack: the same limit, in units of the longest expected time of a step of progress.
        straggling: how many times longer than expected a span must take until an idle worker also
            gets it; only if no other span is left to begin.
        straggling_seconds: the fewest seconds until then.
    """

    attempts: int = 3
    backoff: float = 1.0
    patience: float = 300.0
    slack: float = 20.0
    straggling: float = 2.0
    straggling_seconds: float = 20.0


@dataclass(frozen=True)
class Assign:
    """Have `worker` compute `span`; `attempt` counts from 1, copies for stragglers included."""

    worker: Hashable
    span: int
    attempt: int


@dataclass(frozen=True)
class Replace:
    """End `worker`, which hangs, and start another worker."""

    worker: Hashable
    reason: str


@dataclass(frozen=True)
class GiveUp:
    """`span` has failed too often; `reason` is the last cause."""

    span: int
    reason: str


Decision = Assign | Replace | GiveUp


@dataclass
class Running:
    """A span that a worker computes.

    Attributes:
        span: its number.
        attempt: the number of the try.
        started: time of the start.
        heard: time of the last sign of progress.
        done: number of intervals done.
    """

    span: int
    attempt: int
    started: float
    heard: float
    done: float = 0.0


class Scheduler:
    """Hands spans to workers.

    Args:
        intervals: number of intervals of each span, in the order in which to begin spans.
        policy: limits of patience.
        seconds: expected duration of an interval; None if unknown.
        step_seconds: the longest expected duration of a step of progress; None to judge workers by
            the pace seen so far.
    """

    def __init__(
        self,
        intervals: Sequence[int],
        *,
        policy: Policy | None = None,
        seconds: float | None = None,
        step_seconds: float | None = None,
    ) -> None:
        self.policy = policy or Policy()
        self.running: dict[Hashable, Running] = {}
        self.unfinished = len(intervals)
        self._intervals = intervals
        self._seconds, self._step_seconds = seconds, step_seconds
        self._begun = 0  # spans that have been handed out at least once
        self._over = bytearray(len(intervals))  # 1 for spans that are done or given up
        self._issued = bytearray(len(intervals))  # tries begun; stays at 255
        self._failed: dict[int, int] = {}  # failed tries, of spans with any
        self._waiting: list[tuple[float, int]] = []  # a heap of (due, span)
        self._idle: OrderedDict[Hashable, None] = OrderedDict()
        self._holders: dict[int, int] = {}  # workers at each running span

    @property
    def finished(self) -> bool:
        """Whether every span is done or given up."""
        return self.unfinished == 0

    def worker_ready(self, worker: Hashable, now: float) -> list[Decision]:
        """Handle a worker that has set up."""
        self._idle[worker] = None
        return self.tick(now)

    def worker_lost(self, worker: Hashable, reason: str, now: float) -> list[Decision]:
        """Handle the death of a worker; its span is tried again at once."""
        self._idle.pop(worker, None)
        decisions: list[Decision] = []
        if (held := self._take(worker)) is not None:
            decisions += self._failure(held.span, reason, now, final=False)
        return decisions + self.tick(now)

    def span_done(self, worker: Hashable, now: float) -> list[Decision]:
        """Handle a finished span, whether or not this worker finished it first."""
        held = self._take(worker)
        self._idle[worker] = None
        if held is not None and not self._over[held.span]:
            self._end(held.span)
            each = (now - held.started) / self._intervals[held.span]
            # The pace of about the last dozen spans.
            old = each if self._seconds is None else self._seconds
            self._seconds = old + (each - old) / 12
        return self.tick(now)

    def span_failed(
        self, worker: Hashable, reason: str, now: float, *, final: bool = False
    ) -> list[Decision]:
        """Handle a failed span of a worker that lives; `final` if no retry can help."""
        held = self._take(worker)
        self._idle[worker] = None
        decisions: list[Decision] = []
        if held is not None:
            times = self._failed.get(held.span, 0)
            wait = self.policy.backoff * 4.0**times
            decisions += self._failure(held.span, reason, now + wait, final=final)
        return decisions + self.tick(now)

    def progress(self, worker: Hashable, done: float, now: float) -> None:
        """Handle a sign of life from within a span: `done` of its intervals are done."""
        held = self.running.get(worker)
        if held is not None and done > held.done:
            longest = self._step_seconds or 0.0
            self._step_seconds = max(longest, now - held.heard)
            held.done, held.heard = done, now

    def forgive(self, now: float) -> None:
        """Forgive all silence until now, since signs of life could not be received."""
        for held in self.running.values():
            held.heard = now

    def overdue(self, now: float) -> list[Decision]:
        """Replace workers without progress for too long; each counts as lost."""
        if self._step_seconds is None and self.policy.slack:
            return []  # nothing is known to compare with
        limit = max(self.policy.patience, self.policy.slack * (self._step_seconds or 0.0))
        late = [worker for worker, held in self.running.items() if now - held.heard > limit]
        decisions: list[Decision] = []
        for worker in late:
            reason = f"its worker made no progress for {now - self.running[worker].heard:.0f} s"
            decisions.append(Replace(worker, reason))
            decisions += self.worker_lost(worker, reason, now)
        return decisions

    def _take(self, worker: Hashable) -> Running | None:
        held = self.running.pop(worker, None)
        if held is not None:
            self._holders[held.span] -= 1
            if not self._holders[held.span]:
                del self._holders[held.span]
        return held

    def _end(self, span: int) -> None:
        self._over[span] = 1
        self._failed.pop(span, None)
        self.unfinished -= 1

    def _failure(self, span: int, reason: str, due: float, *, final: bool) -> Iterator[Decision]:
        if self._over[span]:
            return
        self._failed[span] = self._failed.get(span, 0) + 1
        if span in self._holders and not final:
            return  # another worker still computes it
        if final or self._failed[span] >= self.policy.attempts:
            self._end(span)
            yield GiveUp(span, reason)
        else:
            heapq.heappush(self._waiting, (due, span))

    def tick(self, now: float) -> list[Decision]:
        """Give idle workers spans: retries that are due by now, new spans, copies of stragglers."""
        decisions: list[Decision] = []
        while self._idle and (span := self._next(now)) is not None:
            worker, _ = self._idle.popitem(last=False)
            self._issued[span] = min(255, self._issued[span] + 1)
            self._holders[span] = self._holders.get(span, 0) + 1
            self.running[worker] = Running(span, self._issued[span], now, now)
            decisions.append(Assign(worker, span, self._issued[span]))
        return decisions

    def _next(self, now: float) -> int | None:
        while self._waiting and (self._waiting[0][0] <= now or self._over[self._waiting[0][1]]):
            _, span = heapq.heappop(self._waiting)
            if not self._over[span]:
                return span
        if self._begun < len(self._intervals):
            self._begun += 1
            return self._begun - 1
        return None if self._waiting else self._straggler(now)

    def _straggler(self, now: float) -> int | None:
        """The running span that is most behind its expected duration, if any is late."""
        if self._seconds is None:
            return None
        latest, found = self.policy.straggling, None
        for held in self.running.values():
            elapsed = now - held.started
            if self._over[held.span] or self._holders[held.span] > 1:
                continue
            expected = max(self._seconds * self._intervals[held.span], 1e-9)
            if elapsed > self.policy.straggling_seconds and elapsed / expected > latest:
                latest, found = elapsed / expected, held.span
        return found
