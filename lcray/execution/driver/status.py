"""How far an analysis is: what its driver says in ``OUT/status.json``, and what is committed.

The file is a courtesy. A thread writes it every few seconds, whole or not at all; where it cannot
be written, the analysis goes on without.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

from lcray.errors import LcrayError, OutputError
from lcray.execution.worker.reports import SpanReport, View, report_of
from lcray.planning.plan import Plan, Span
from lcray.storage import Place, PlaceLike, place
from lcray.storage.files import read_json, write_json_atomic
from lcray.storage.json_types import build
from lcray.storage.lock import STALE, driver_has_ended, pulse
from lcray.tables.output import Output
from lcray.tables.shards.commit import each_commit

_SECONDS_A_WRITE = 5.0
_SILENT = 30.0  # seconds: later, the driver may be gone
_GONE = "its driver ended without a word: it was killed, or could not write"
_GO_ON = "run its command again to go on: what is committed is kept"
_AT_WORK = ("running", "following", "reducing")
_STATES = (*_AT_WORK, "finished", "failed", "interrupted")


@dataclass(frozen=True)
class Gap:
    """How well the spans close that are done.

    Attributes:
        loss_change: Σ measured changes of the loss, in nats.
        lc: Σ LC.
    """

    loss_change: float
    lc: float

    @property
    def gap(self) -> float:
        """Σ LC minus the measured change."""
        return self.lc - self.loss_change


@dataclass(frozen=True)
class RunningSpan:
    """A span that a worker is at.

    Attributes:
        first: the step it starts at.
        last: the step it ends at.
        attempt: which try it is.
        done: intervals that are done.
        intervals: of the span.
        seconds: since it was begun.
    """

    first: int
    last: int
    attempt: int
    done: float
    intervals: int
    seconds: float


@dataclass(frozen=True)
class FailedSpan:
    """A span that was given up.

    Attributes:
        first: the step it starts at.
        last: the step it ends at.
        reason: the last cause.
    """

    first: int
    last: int
    reason: str


@dataclass(frozen=True)
class Status:
    """How far an analysis is.

    Attributes:
        state: ``running``, ``following`` (waiting for more checkpoints), ``reducing``,
            ``finished``, ``failed``, ``interrupted``, or ``unknown`` where no driver said anything.
        spans: in all.
        spans_done: that are committed.
        intervals: in all.
        intervals_done: that are committed.
        workers: that are ready.
        running: the spans in hand.
        failed: the spans that were given up.
        rate: intervals a second, since the driver started; None before the first.
        seconds_left: at that rate.
        gaps: so far, by split.
        error: what ended the driver, if an error did.
        written: when the driver said so, by its clock (ISO 8601, UTC); empty if it never did.
        silent: whether that is more than 30 seconds ago by the clock here and the state is not
            final: the driver may be gone. An ``interrupted`` one is, without having said so.
    """

    state: str
    spans: int
    spans_done: int
    intervals: int
    intervals_done: int
    workers: int = 0
    running: tuple[RunningSpan, ...] = ()
    failed: tuple[FailedSpan, ...] = ()
    rate: float | None = None
    seconds_left: float | None = None
    gaps: Mapping[str, Gap] = field(default_factory=dict)
    error: str = ""
    written: str = ""
    silent: bool = False


def status(out: PlaceLike) -> Status:
    """How far the analysis is that writes to `out`, from anywhere that can read it.

    What the driver said last is taken as it is while it is at work; else commits are counted.
    A driver that cannot say how it ended, since it was killed or its disk is full, is known by the
    lock that it has let go of, or by its process, if that was on this machine.

    Raises:
        OutputError: if `out` is no output.
        CorruptionError: if it is damaged.
    """
    folder = place(out)
    output = Output(folder)
    plan, said = output.record().plan, _read(output)
    if said is not None and said.state in _AT_WORK:
        gone = driver_has_ended(folder)
        age = (datetime.now(UTC) - datetime.fromisoformat(said.written)).total_seconds()
        if abs(age) <= _SILENT and not gone:
            return said
        said = replace(said, silent=True, workers=0, running=(), rate=None, seconds_left=None)
        if gone:
            said = replace(said, state="interrupted", error=_GONE)
    tally = Standing(plan)
    for span, commit in each_commit(folder, plan.spans):
        tally.add(span, report_of(commit))
    return tally.status(said or Status("unknown", 0, 0, 0, 0))


def _read(output: Output) -> Status | None:
    """What the driver said; None if it never did, or nothing that can be understood."""
    with suppress(LcrayError, TypeError, ValueError):
        said = build(Status, read_json(output.status))
        counts = (said.spans, said.spans_done, said.intervals, said.intervals_done, said.workers)
        zone = datetime.fromisoformat(said.written).tzinfo
        if said.state in _STATES and min(counts) >= 0 and zone is not None:
            return said
    return None


class Silence:
    """For how long an output has given no sign of a driver: no new word, no beat of its lock.

    By the clock here, since clocks of machines need not agree.

    Args:
        out: the output.
    """

    def __init__(self, out: PlaceLike) -> None:
        self._out, self._since = place(out), time.monotonic()
        self._signs: tuple[str, tuple[int, int]] | None = None

    def check(self, found: Status) -> None:
        """Look for signs beside `found`, an analysis that has not ended.

        Raises:
            OutputError: if there were none for as long as it takes to lose the lock, or the driver
                is known to have ended without a word.
        """
        if found.silent and found.state == "interrupted":
            raise OutputError(f"{self._out}: {_GONE}; {_GO_ON}")
        now, signs = time.monotonic(), (found.written, pulse(self._out))
        if signs != self._signs:
            self._signs, self._since = signs, now
        elif now - self._since >= STALE:
            raise OutputError(
                f"{self._out}: no sign of its driver for {STALE:.0f} s: it was killed, or not "
                f"started; {_GO_ON}"
            )


class Standing:
    """Counts what is committed.

    Args:
        plan: the plan.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._spans = self._intervals = 0
        self._gaps: dict[str, Gap] = {}

    def extend(self, plan: Plan) -> None:
        """The plan has got more spans."""
        self._plan = plan

    def add(self, span: Span, report: SpanReport) -> None:
        """A span is committed."""
        self._spans += 1
        self._intervals += span.n_intervals
        for split, (change, lc) in report.sums.items():
            old = self._gaps.get(split, Gap(0.0, 0.0))
            self._gaps[split] = Gap(old.loss_change + change, old.lc + lc)

    @property
    def intervals(self) -> int:
        """Intervals that are committed."""
        return self._intervals

    def status(self, said: Status) -> Status:
        """`said`, with what is counted."""
        return replace(
            said,
            spans=len(self._plan.spans),
            spans_done=self._spans,
            intervals=self._plan.n_intervals,
            intervals_done=self._intervals,
            gaps=dict(self._gaps),
        )


class StatusFile:
    """Writes ``OUT/status.json`` now and then, from a thread; a context manager.

    Leaving it says how the analysis ended.

    Args:
        out: the output directory.
        plan: the plan.
        holds: whether `out` is this driver's still; where it is not, nothing more is said.
    """

    def __init__(self, out: Place, plan: Plan, holds: Callable[[], bool] = lambda: True) -> None:
        self._output, self._holds = Output(out), holds
        self._standing = Standing(plan)
        self._latest = Status("running", 0, 0, 0, 0)
        self._started, self._before, self._new = time.monotonic(), 0, 0
        self._wake, self._ends = threading.Event(), False
        self._thread = threading.Thread(target=self._write_often, name="lcray-status", daemon=True)

    def __enter__(self) -> StatusFile:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        state = "finished" if error is None else "failed"
        if error is not None and not isinstance(error, Exception):
            state = "interrupted"
        text = str(error) if isinstance(error, Exception) else ""
        self._say(replace(self._latest, state=state, running=(), workers=0, error=text))
        self._ends = True
        self._wake.set()
        self._thread.join(timeout=10)  # storage that hangs must not keep the command from ending

    @property
    def latest(self) -> Status:
        """What would be written now."""
        return self._latest

    def extend(self, plan: Plan) -> None:
        """The plan has got more spans."""
        self._standing.extend(plan)

    def resume(self, commits: Iterable[tuple[Span, SpanReport]]) -> int:
        """Spans that were committed before; returns the number of their intervals."""
        for span, report in commits:
            self._standing.add(span, report)
        self._before = self._standing.intervals
        self._started = time.monotonic()
        self._say(self._latest)
        self._wake.set()
        return self._before

    def done(self, span: Span, report: SpanReport) -> int:
        """A span is committed; returns the intervals that are."""
        self._standing.add(span, report)
        others = [r for r in self._latest.running if (r.first, r.last) != (span.first, span.last)]
        self._say(replace(self._latest, running=tuple(others)))
        return self._standing.intervals

    def view(self, view: View) -> None:
        """How far the other spans are."""
        running = tuple(
            RunningSpan(
                held.span.first,
                held.span.last,
                held.attempt,
                held.done,
                held.span.n_intervals,
                held.seconds,
            )
            for held in view.running
        )
        failed = tuple(FailedSpan(s.first, s.last, why) for s, why in view.failures.items())
        self._say(replace(self._latest, workers=view.workers, running=running, failed=failed))

    def state(self, state: str) -> None:
        """What the driver is at."""
        self._say(replace(self._latest, state=state, running=()))
        self._wake.set()

    def _say(self, said: Status) -> None:
        found = self._standing.status(said)
        elapsed, new = time.monotonic() - self._started, found.intervals_done - self._before
        new_and_running = new + sum(held.done for held in found.running)
        rate = new_and_running / elapsed if new_and_running and elapsed else None
        left = found.intervals - self._before - new_and_running
        self._latest = replace(
            found, rate=rate, seconds_left=None if rate is None else max(0.0, left) / rate
        )

    def _write_often(self) -> None:
        while not self._ends:
            self._write()
            self._wake.wait(_SECONDS_A_WRITE)
            self._wake.clear()
        self._write()

    def _write(self) -> None:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        data: dict[str, Any] = asdict(replace(self._latest, written=now))
        with suppress(LcrayError, ValueError):
            if self._holds():
                write_json_atomic(self._output.status, data)
