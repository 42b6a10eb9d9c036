"""Windows of iterations: the whole run, fixed widths, and named ranges of steps.

An interval belongs to a window by its `start_step`. Windows may overlap; every finding accepts any.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lcray.errors import UsageError
from lcray.storage.numbers import step_range
from lcray.tables.reading.results import Results

#: The name of the window that contains every interval; it comes first.
RUN = "run"

Ranges = Mapping[str, str]


@dataclass(frozen=True)
class Window:
    """The intervals with first <= start_step < end.

    Attributes:
        name: ``run``, ``first:end``, or the user's name.
        first: a step.
        end: a step, exclusive.
    """

    name: str
    first: int
    end: int

    @property
    def columns(self) -> dict[str, str | int]:
        """The columns of a finding's rows: window, first_step, end_step."""
        return {"window": self.name, "first_step": self.first, "end_step": self.end}

    def holds(self, starts: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which intervals are in the window, by their start steps [T]; [T]."""
        return np.asarray((starts >= self.first) & (starts < self.end))


@dataclass(frozen=True)
class Windows:
    """Windows in the order of the tables' rows.

    Attributes:
        items: the windows; names are distinct, and every window has an interval.
    """

    items: tuple[Window, ...]

    def __iter__(self) -> Iterator[Window]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)

    def __add__(self, other: Windows) -> Windows:
        return Windows(self.items + other.items)

    @classmethod
    def whole(cls, steps: Sequence[int]) -> Windows:
        """The whole run alone; `steps` are the steps of all checkpoints."""
        return cls((Window(RUN, steps[0], steps[-1]),))

    @classmethod
    def fixed(cls, steps: Sequence[int], width: int) -> Windows:
        """Windows from one multiple of `width` to the next; windows without intervals are left out.

        Raises:
            UsageError: for a width below 1.
        """
        if width < 1:
            raise UsageError(f"window {width}: a width is a number of steps, at least 1")
        firsts = sorted({step // width * width for step in steps[:-1]})
        return cls(tuple(Window(f"{a}:{a + width}", a, a + width) for a in firsts))

    @classmethod
    def named(cls, steps: Sequence[int], ranges: Ranges) -> Windows:
        """Windows by name, each a range of start steps such as ``"0:100"``, ``"100:"``, ``":50"``.

        Raises:
            UsageError: for text that is not a range, one without intervals, or the name ``run``.
        """
        return cls(tuple(_named(steps, name, text) for name, text in ranges.items()))

    @classmethod
    def of(
        cls, results: Results, window: int | None = None, windows: Ranges | None = None
    ) -> Windows:
        """The whole run, then the windows of a fixed width, then the named ones.

        Args:
            results: the output.
            window: the width in steps; None for the output's own base windows, unless `windows`
                are given.
            windows: ranges of start steps by name.

        Raises:
            UsageError: as for `fixed` and `named`, or for a name that occurs twice.
        """
        steps = results.plan.steps
        found = cls.whole(steps)
        if window is not None or not windows:
            found += cls.fixed(steps, results.plan.window if window is None else window)
        found += cls.named(steps, windows or {})
        names = [item.name for item in found]
        for name in names:
            if names.count(name) > 1:
                raise UsageError(f"window {name!r}: two windows have this name")
        return found


def _named(steps: Sequence[int], name: str, text: str) -> Window:
    found = step_range(text)
    if found is None:
        raise UsageError(f"window {name!r}: {text!r} is not a range like '0:100', '100:' or ':100'")
    ends = steps[0], steps[-1]
    if name in ("", RUN):
        raise UsageError(f"window {name!r}: choose another name, {RUN!r} is the whole run")
    first, end = (here if step is None else step for step, here in zip(found, ends, strict=True))
    window = Window(name, first, end)
    if not window.holds(np.array(steps[:-1])).any():
        raise UsageError(
            f"window {name!r}: no interval starts in {text}; steps are {steps[0]} to {steps[-1]}"
        )
    return window
