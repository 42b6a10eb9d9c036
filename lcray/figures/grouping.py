"""Neighbouring intervals taken together, so that a figure has as many columns as it can show.

Legend: T intervals, C columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lcray.errors import UsageError

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Columns:
    """At most so many columns, each of one or more neighbouring intervals.

    Attributes:
        firsts: the start step of each column's first interval [C].
        ends: the end step of its last [C].
        cuts: the position of each column's first interval [C].
        total: T.
    """

    firsts: NDArray[np.int64]
    ends: NDArray[np.int64]
    cuts: NDArray[np.int64]
    total: int

    @classmethod
    def of(cls, starts: NDArray[np.int64], ends: NDArray[np.int64], most: int) -> Columns:
        """As even columns of intervals [T] as there can be, at most `most`.

        Raises:
            UsageError: for fewer than 1.
        """
        if most < 1:
            raise UsageError(f"columns {most}: must be at least 1")
        n = len(starts)
        size = max(1, -(-n // most))
        cuts = np.arange(0, n, size)
        lasts = np.minimum(cuts + size, n) - 1
        return cls(starts[cuts], ends[lasts], cuts, n)

    def __len__(self) -> int:
        return len(self.cuts)

    def sums(self, values: Floats) -> Floats:
        """Sums of [T, …] over each column's intervals, [C, …]; NaN where none has a number."""
        known = np.isfinite(values)
        total = np.add.reduceat(np.where(known, values, 0.0), self.cuts, axis=0)
        return np.where(np.add.reduceat(known, self.cuts, axis=0), total, np.nan)

    @property
    def notes(self) -> list[str]:
        """What a reader must know: how many intervals are in a column, if more than one."""
        if len(self) == self.total:
            return []
        size = int(self.cuts[1]) if len(self) > 1 else self.total
        return [f"{self.total} intervals in {len(self)} columns: sums of {size} intervals each"]
