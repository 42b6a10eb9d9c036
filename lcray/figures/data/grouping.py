"""Grouping neighbouring intervals into as many columns as a figure can show.

DuckDB computes the sums, in the order of the steps: a long run is not read into memory, and the
sums are the same bit for bit, however many threads compute them.

Legend: T intervals, C columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lcray.errors import UsageError
from lcray.tables.reading.results import Results

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Columns:
    """Columns of a figure, each of one or more neighbouring intervals.

    Attributes:
        rows: SQL of the rows that hold the intervals: a table, and a condition if any.
        each: intervals per column; the last column may have fewer.
        firsts: the start step of each column's first interval, [C].
        ends: the end step of each column's last interval, [C].
        total: T.
    """

    rows: str
    each: int
    firsts: NDArray[np.int64]
    ends: NDArray[np.int64]
    total: int

    @classmethod
    def of(cls, results: Results, rows: str, most: int) -> Columns:
        """Columns of equal size for the intervals of `rows`, at most `most` of them.

        Raises:
            UsageError: for fewer than 1.
        """
        if most < 1:
            raise UsageError(f"columns {most}: must be at least 1")
        found = results.sql_arrow(f"SELECT DISTINCT start_step FROM {rows} ORDER BY start_step")
        starts: NDArray[np.int64] = found["start_step"].to_numpy()
        each = max(1, -(-len(starts) // most))
        lasts = np.minimum(np.arange(each - 1, len(starts) + each - 1, each), len(starts) - 1)
        steps = np.array(results.plan.steps)
        ends = steps[np.searchsorted(steps, starts[lasts]) + 1]
        return cls(rows, each, starts[::each], ends, len(starts))

    def __len__(self) -> int:
        return len(self.firsts)

    @property
    def sql(self) -> str:
        """The beginning of a query, which defines a table `grid` with start_step and col."""
        return (
            "WITH grid AS (SELECT start_step, (row_number() OVER (ORDER BY start_step) - 1) "
            f"// {self.each} AS col FROM (SELECT DISTINCT start_step FROM {self.rows}))\n"
        )

    def read(
        self, results: Results, rows: str, what: Sequence[str], by: Sequence[str] = ()
    ) -> pa.Table:
        """One row for each column and group that has values.

        Args:
            results: the output.
            rows: SQL of the rows to group: a table, or a query in parentheses.
            what: SQL of aggregates, such as `total` gives.
            by: columns of `rows` that define groups.

        Returns:
            `by`, ``col`` (the position of the column), and `what`.
        """
        keys = ", ".join((*by, "col"))
        return results.sql_arrow(
            f"{self.sql}SELECT {keys}, {', '.join(what)} FROM {rows} JOIN grid USING (start_step) "
            f"GROUP BY {keys} ORDER BY {keys}"
        )

    @property
    def notes(self) -> list[str]:
        """A note for readers: how many intervals a column has, if more than one."""
        if self.each == 1:
            return []
        size = min(self.each, self.total)
        return [f"{self.total} intervals in {len(self)} columns: sums of {size} intervals each"]


def total(column: str) -> str:
    """SQL of a sum that is the same bit for bit, for any number of threads; null without values."""
    return f"sum({column}::DOUBLE ORDER BY start_step) AS {column}"


def cumulative(values: Floats) -> Floats:
    """Sums up to every point along the last axis, from 0 on; what is missing counts 0."""
    zero = np.zeros((*values.shape[:-1], 1))
    return np.concatenate([zero, np.cumsum(np.nan_to_num(values), axis=-1)], axis=-1)


def colour_limit(lc: Floats, percentile: float = 98.0) -> float:
    """The largest |LC| that colours tell apart: a percentile of |LC|, but always above 0."""
    size = np.abs(lc[np.isfinite(lc)])
    if not size.any():
        return 1.0
    return float(np.percentile(size, percentile)) or float(size.max())


def numbers(table: pa.Table, column: str) -> Floats:
    """A column as float64; NaN for null."""
    values: Any = table[column].to_numpy()
    return np.asarray(values, np.float64)
