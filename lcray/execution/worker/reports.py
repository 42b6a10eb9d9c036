"""Progress and results of spans."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lcray.errors import LcrayError
from lcray.planning.plan import Span
from lcray.tables.shards.commit import Commit

if TYPE_CHECKING:  # torch, which `lcray status` does without
    from lcray.allocation.allocator import IntervalLC


@dataclass(frozen=True, slots=True)
class SpanReport:
    """The result of one attempt at a span.

    Attributes:
        committed: whether this attempt counts; another may have been first.
        n_gradients: full-batch gradients evaluated for the intervals' rules.
        seconds: wall time.
        sums: (Σ loss change, Σ LC) over the intervals with both, by split.
    """

    committed: bool
    n_gradients: int
    seconds: float
    sums: Mapping[str, tuple[float, float]] = field(default_factory=dict)


def report_of(commit: Commit) -> SpanReport:
    """The report of a span that another attempt committed, as far as its commit has it."""
    try:
        sums = {name: (float(c), float(lc)) for name, (c, lc) in commit.info["sums"].items()}
        n_gradients, seconds = int(commit.info["n_gradients"]), float(commit.info["seconds"])
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError):
        return SpanReport(committed=False, n_gradients=0, seconds=0.0)
    return SpanReport(False, n_gradients, seconds, sums)


@dataclass
class Outcome:
    """The results of the spans of one call.

    Attributes:
        reports: reports of the committed spans.
        failures: the reason by span, for spans that are not committed.
        cause: the error of the first failure, if it was raised in this process.
    """

    reports: dict[Span, SpanReport] = field(default_factory=dict)
    failures: dict[Span, str] = field(default_factory=dict)
    cause: LcrayError | None = None


@dataclass(frozen=True)
class RunningSpan:
    """A span that a worker computes.

    Attributes:
        first: the step at its start.
        last: the step at its end.
        attempt: the number of the attempt, from 1.
        done: number of intervals done.
        intervals: number of its intervals.
        seconds: time since its start.
    """

    first: int
    last: int
    attempt: int
    done: float
    intervals: int
    seconds: float


@dataclass(frozen=True)
class View:
    """Progress of the spans of one call.

    Attributes:
        workers: number of ready workers.
        running: the spans that workers compute.
        failures: the reason by span, for spans that are given up.
    """

    workers: int
    running: tuple[RunningSpan, ...]
    failures: dict[Span, str]


class Tally:
    """The progress and sums of a span so far.

    Args:
        size: number of (interval, split) pairs in the span.
        n_intervals: number of its intervals.
        tell: called with the number of intervals done, split by split, and while tables are
            written, as a sign of life.
    """

    def __init__(self, size: int, n_intervals: int, tell: Callable[[float], None]) -> None:
        self.n_gradients = 0
        self.sums: dict[str, tuple[float, float]] = {}
        self._seen, self._size, self._n_intervals, self._tell = 0, size, n_intervals, tell

    def add(self, split: str, result: IntervalLC) -> None:
        """Count the result of an interval."""
        self.n_gradients += result.n_gradients
        if result.lc is not None:
            change, lc = self.sums.get(split, (0.0, 0.0))
            sums = change + result.loss_end - result.loss_start, lc + float(result.lc.sum())
            if all(map(math.isfinite, sums)):
                self.sums[split] = sums
        self._seen += 1
        self.tell(0.0)

    def tell(self, more: float) -> None:
        """Report progress; writing tables counts as `more` of an interval."""
        self._tell(self._seen / self._size * self._n_intervals + more)
