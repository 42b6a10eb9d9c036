"""What becomes of spans: while one is computed, when it is done, and of all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from lcray.allocation.allocator import IntervalLC
from lcray.planning.plan import Span
from lcray.tables.shards.writer import Commit


@dataclass(frozen=True, slots=True)
class SpanReport:
    """What came of one attempt at a span.

    Attributes:
        committed: whether this attempt counts; another may have been first.
        n_gradients: full-batch gradients evaluated for the intervals' rules.
        seconds: wall time.
        sums: (Σ loss change, Σ LC) over the intervals that have both, by split.
    """

    committed: bool
    n_gradients: int
    seconds: float
    sums: Mapping[str, tuple[float, float]] = field(default_factory=dict)


def report_of(commit: Commit) -> SpanReport:
    """The report of a span that another attempt has committed, as far as it says so."""
    try:
        sums = {name: (float(c), float(lc)) for name, (c, lc) in commit.info["sums"].items()}
        n_gradients, seconds = int(commit.info["n_gradients"]), float(commit.info["seconds"])
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError):
        return SpanReport(committed=False, n_gradients=0, seconds=0.0)
    return SpanReport(False, n_gradients, seconds, sums)


@dataclass
class Outcome:
    """What became of the spans of one call.

    Attributes:
        reports: of the spans that are committed.
        failures: the reason by span, for those that are not.
    """

    reports: dict[Span, SpanReport] = field(default_factory=dict)
    failures: dict[Span, str] = field(default_factory=dict)


@dataclass(frozen=True)
class SpanInHand:
    """A span that a worker is at.

    Attributes:
        span: the span.
        attempt: which try it is.
        done: intervals that are done.
        seconds: since it was begun.
    """

    span: Span
    attempt: int
    done: float
    seconds: float


@dataclass(frozen=True)
class View:
    """How far the spans of one call are.

    Attributes:
        workers: that are ready.
        running: the spans in hand.
        failures: the reason by span, for those that are given up.
    """

    workers: int
    running: tuple[SpanInHand, ...]
    failures: dict[Span, str]


class Tally:
    """What a span has come to so far.

    Args:
        size: (interval, split) pairs in the span.
        n_intervals: its intervals.
        tell: called with the intervals that are done, split by split, and while tables are
            written: a sign of life.
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
        """Say how far the span is; writing tables counts for `more` of an interval."""
        self._tell(self._seen / self._size * self._n_intervals + more)
