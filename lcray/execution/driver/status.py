"""Progress of an analysis: the status that its driver writes, and a count of its commits.

The analysis does not need ``OUT/status.json``. A thread writes it every few seconds, whole or not
at all; if it cannot be written, the analysis continues without it.
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
from lcray.execution.worker.reports import RunningSpan, SpanReport, View, report_of
from lcray.planning.plan import Plan, Span
from lcray.storage import Place, PlaceLike, place
from lcray.storage.files import read_json, write_json_atomic
from lcray.storage.json_types import build
from lcray.storage.lock import STALE, driver_has_ended, pulse
from lcray.tables.output import Output
from lcray.tables.shards.commit import each_commit

_SECONDS_A_WRITE = 5.0
_SILENT = 30.0  # seconds: later, the driver may be gone
_GONE = "its driver ended without a final status: it was killed, or could not write"
_RESUME = "run its command again to resume: what is committed is kept"
_AT_WORK = ("running", "following", "reducing")
_STATES = (*_AT_WORK, "finished", "failed", "interrupted")


@dataclass(frozen=True)
class Gap:
    """Sums over the committed spans of a split.

    Attributes:
        loss_change: sum of the measured changes of the loss, in units of the loss.
        lc: sum of LC, likewise.
    """

    loss_change: float
    lc: float

    @property
    def gap(self) -> float:
        """The sum of LC minus the measured change."""
        return self.lc - self.loss_change


@dataclass(frozen=True)
class FailedSpan:
    """A span that was given up.

    Attributes:
        first: the step at its start.
        last: the step at its end.
        reason: the last cause.
    """

    first: int
    last: int
    reason: str


@dataclass(frozen=True)
class Status:
    """Progress of an analysis.

    Attributes:
        state: ``running``, ``following`` (waiting for more checkpoints), ``reducing``,
            ``finished``, ``failed``, ``interrupted``, or ``unknown`` if no driver wrote a status.
        spans: number of all spans.
        spans_done: number of committed spans.
        intervals: number of all intervals.
        intervals_done: number of committed intervals.
        workers: number of ready workers.
        running: the spans that workers compute.
        failed: the spans that were given up.
        rate: intervals per second, since the driver started; None before the first.
        seconds_left: at that rate.
        gaps: sums so far, by split.
        error: the error that ended the driver; empty if there was none.
        written: when the driver wrote this, by its clock (ISO 8601, UTC); empty if it never did.
        silent: whether that is more than 30 seconds ago by the clock here and the state is not
            final, so that the driver may have ended. If it is known to have ended without a final
            status, the state is ``interrupted``.
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
    """Progress of the analysis that writes to `out`, from anywhere that can read it.

    While the driver works, this is the last status that it wrote; otherwise commits are counted. A
    driver that could not write how it ended, since it was killed or its disk is full, is recognized
    by the lock that it has released, or by its process, if that was on this machine.

    Raises:
        OutputError: if `out` is not an output.
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
    found = replace(said or _new("unknown", plan), spans_done=0, intervals_done=0, gaps={})
    for span, commit in each_commit(folder, plan.spans):
        found = _counted(found, span, report_of(commit))
    return _planned(found, plan)


def _read(output: Output) -> Status | None:
    """The status that the driver wrote; None if there is none, or none that is valid."""
    with suppress(LcrayError, TypeError, ValueError):
        said = build(Status, read_json(output.status))
        counts = (said.spans, said.spans_done, said.intervals, said.intervals_done, said.workers)
        zone = datetime.fromisoformat(said.written).tzinfo
        if said.state in _STATES and min(counts) >= 0 and zone is not None:
            return said
    return None


class Silence:
    """Measures how long an output has had no sign of a driver: no new status, no beat of its lock.

    It uses the clock here, since the clocks of machines need not agree.

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
                is known to have ended without a final status.
        """
        if found.silent and found.state == "interrupted":
            raise OutputError(f"{self._out}: {_GONE}; {_RESUME}")
        now, signs = time.monotonic(), (found.written, pulse(self._out))
        if signs != self._signs:
            self._signs, self._since = signs, now
        elif now - self._since >= STALE:
            raise OutputError(
                f"{self._out}: no sign of its driver for {STALE:.0f} s: it was killed, or not "
                f"started; {_RESUME}"
            )


def _new(state: str, plan: Plan) -> Status:
    return Status(state, len(plan.spans), 0, plan.n_intervals, 0)


def _planned(said: Status, plan: Plan) -> Status:
    """`said` with the totals of `plan`."""
    return replace(said, spans=len(plan.spans), intervals=plan.n_intervals)


def _counted(said: Status, span: Span, report: SpanReport) -> Status:
    """`said` with one more committed span."""
    gaps = dict(said.gaps)
    for split, (change, lc) in report.sums.items():
        old = gaps.get(split, Gap(0.0, 0.0))
        gaps[split] = Gap(old.loss_change + change, old.lc + lc)
    spans, intervals = said.spans_done + 1, said.intervals_done + span.n_intervals
    return replace(said, spans_done=spans, intervals_done=intervals, gaps=gaps)


class StatusFile:
    """Writes ``OUT/status.json`` every few seconds, from a thread; a context manager.

    At the end of the block it writes how the analysis ended.

    Args:
        out: the output directory.
        plan: the plan.
        holds: whether this driver still has the lock of `out`; if not, nothing more is written.

    Attributes:
        latest: the status that would be written now.
    """

    def __init__(self, out: Place, plan: Plan, holds: Callable[[], bool] = lambda: True) -> None:
        self._output, self._holds = Output(out), holds
        self.latest = _new("running", plan)
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
        self._say(replace(self.latest, state=state, running=(), workers=0, error=text))
        self._ends = True
        self._wake.set()
        self._thread.join(timeout=10)  # storage that hangs must not keep the command from ending

    def extend(self, plan: Plan) -> None:
        """Take the totals of a plan with more spans."""
        self.latest = _planned(self.latest, plan)

    def resume(self, commits: Iterable[tuple[Span, SpanReport]]) -> int:
        """Count spans that were committed earlier; returns the number of their intervals."""
        found = self.latest
        for span, report in commits:
            found = _counted(found, span, report)
        self._before = found.intervals_done
        self._started = time.monotonic()
        self._say(found)
        self._wake.set()
        return self._before

    def done(self, span: Span, report: SpanReport) -> int:
        """Count a span that is committed now; returns the number of committed intervals."""
        ends = span.first, span.last
        others = tuple(held for held in self.latest.running if (held.first, held.last) != ends)
        self._say(replace(_counted(self.latest, span, report), running=others))
        return self.latest.intervals_done

    def view(self, view: View) -> None:
        """Take the progress of the spans that are not committed."""
        failed = tuple(FailedSpan(s.first, s.last, why) for s, why in view.failures.items())
        self._say(replace(self.latest, workers=view.workers, running=view.running, failed=failed))

    def state(self, state: str) -> None:
        """Set the state of the analysis."""
        self._say(replace(self.latest, state=state, running=()))
        self._wake.set()

    def _say(self, said: Status) -> None:
        elapsed, new = time.monotonic() - self._started, said.intervals_done - self._before
        new_and_running = new + sum(held.done for held in said.running)
        rate = new_and_running / elapsed if new_and_running and elapsed else None
        left = said.intervals - self._before - new_and_running
        self.latest = replace(
            said, rate=rate, seconds_left=None if rate is None else max(0.0, left) / rate
        )

    def _write_often(self) -> None:
        while not self._ends:
            self._write()
            self._wake.wait(_SECONDS_A_WRITE)
            self._wake.clear()
        self._write()

    def _write(self) -> None:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        data: dict[str, Any] = asdict(replace(self.latest, written=now))
        with suppress(LcrayError, ValueError):
            if self._holds():
                write_json_atomic(self._output.status, data)
