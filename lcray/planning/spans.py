"""Cut a run into spans: the unit of work, retry and commit. Pure functions.

Each span costs one more gradient, and a few bytes per element of the model. Long spans lose more in
a crash, and leave workers idle at the end. So a span takes about three minutes, within bounds:

- at least 8 intervals and about a minute, or an equal share of the intervals if that is less;
- at most 255 intervals, which fit into 8 bits per element;
- at most a quarter of a worker's share, so that each worker gets several spans;
- long enough that the rows of `parameters` shards (elements of the model × spans) stay under a
  billion, as far as the bounds above allow.

Spans in the last quarter of the intervals have half this length, in the last eighth a quarter, if
that leaves 8 intervals or more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from lcray.planning.plan import Span

TARGET_SECONDS = 180.0
_SHORT_SECONDS = 60.0  # below this a crash loses little, and the additional gradient weighs more
MAX_ELEMENT_ROWS = 1_000_000_000  # of `parameters` shards: elements of the model × spans
_SHORTEST, _LONGEST = 8, 255  # intervals
_SPANS_A_WORKER = 4


def choose_length(
    n_intervals: int,
    *,
    workers: int,
    every: int = 0,
    seconds: float | None = None,
    size: int = 0,
) -> int:
    """The number of intervals per span, before the last spans are cut shorter.

    Args:
        n_intervals: number of all intervals.
        workers: number of workers that share them.
        every: spans are whole blocks of so many intervals, if not 0.
        seconds: seconds per interval; None if unknown.
        size: number of elements of the model.
    """
    short = max(_SHORTEST, int(min(_SHORT_SECONDS / seconds, _LONGEST))) if seconds else _SHORTEST
    low = min(short, math.ceil(n_intervals / workers))
    several = math.ceil(n_intervals / (_SPANS_A_WORKER * workers))
    length = several
    if seconds is not None and seconds > 0:
        few_rows = math.ceil(n_intervals * size / MAX_ELEMENT_ROWS)
        length = min(several, max(few_rows, int(min(TARGET_SECONDS / seconds, _LONGEST))))
    length = min(_LONGEST, max(low, length))
    return length if not every else min(-(-length // every), _LONGEST // every) * every


def timed_length(seconds: float | None, every: int = 0) -> int:
    """The number of intervals per span by duration alone, for a run of unknown length."""
    return choose_length(1 << 40, workers=1, every=every, seconds=seconds or TARGET_SECONDS)


def cut(steps: Sequence[int], length: int) -> tuple[Span, ...]:
    """Spans of `length` intervals; the last one may be shorter."""
    starts = range(0, len(steps) - 1, length)
    return tuple(Span(tuple(steps[i : i + length + 1])) for i in starts)


def cut_tapering(steps: Sequence[int], length: int, every: int = 0) -> tuple[Span, ...]:
    """Spans of `length` intervals that get shorter towards the end.

    Args:
        steps: steps of the checkpoints.
        length: number of intervals of the first spans.
        every: spans are whole blocks of so many intervals, if not 0.
    """
    spans = []
    start, last = 0, len(steps) - 1
    while start < last:
        stop = min(last, start + _due(length, (last - start) / last, every))
        spans.append(Span(tuple(steps[start : stop + 1])))
        start = stop
    return tuple(spans)


def _due(length: int, left: float, every: int) -> int:
    """The length of the next span, when a fraction `left` of all intervals remains."""
    for part in (4, 2):
        shorter = -(-length // part)
        shorter = shorter if not every else -(-shorter // every) * every
        if left <= 1 / (2 * part) and shorter >= _SHORTEST:
            return min(length, shorter)
    return length
