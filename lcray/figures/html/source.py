"""An output's tables, aggregated to the resolution of a chart.

Legend: S splits, B columns of the time grid, L layers, T intervals.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from lcray.analyses.closure import ALLOCATED
from lcray.analyses.series import positions, scattered
from lcray.errors import OutputError
from lcray.figures.data.grouping import Columns, Floats, numbers, total
from lcray.figures.data.matrices import layer_sums
from lcray.tables.reading.results import Results

#: The most columns of a time axis, and the most cells of a chart of layers by time.
MOST_COLUMNS, MOST_CELLS = 1000, 200_000

_SUMS = ("loss_change", "lc", "gap", "first_order_lc")
_LAYER_SUMS = ("lc", "lc_error", "n_helping", "n_hurting", "n_zero")


@dataclass(frozen=True)
class Source:
    """The data that sections are made from.

    Attributes:
        results: the output.
        splits: names, [S].
        layers: names in the model's order, [L]; buffers that never have LC are left out.
        left_out: number of these buffers.
        grid: the columns.
        intervals: sums of columns of `intervals`, by name, [S, B]; NaN if there is none.
        by_layer: sums of columns of `layers`, by name, [S, L, B]; NaN if there is none.
    """

    results: Results
    splits: tuple[str, ...]
    layers: tuple[str, ...]
    left_out: int
    grid: Columns
    intervals: dict[str, Floats]
    by_layer: dict[str, Floats]

    @property
    def each(self) -> int:
        """Intervals per column of the grid."""
        return self.grid.each

    @property
    def n_intervals(self) -> int:
        """T."""
        return self.grid.total

    @property
    def starts(self) -> NDArray[np.int64]:
        """The first step of each column, [B]."""
        return self.grid.firsts

    @property
    def ends(self) -> NDArray[np.int64]:
        """The last step of each column, [B]."""
        return self.grid.ends

    @cached_property
    def totals(self) -> Floats:
        """LC of the layers over the run, [S, L]."""
        return np.asarray(np.nansum(self.by_layer["lc"], axis=2))

    @property
    def coarse(self) -> tuple[str, ...]:
        """A note if several intervals are summed."""
        if self.each == 1:
            return ()
        return (
            f"The run has {self.n_intervals:,} intervals: here each point or column adds up "
            f"{self.each:,} of them. The tables have every one.",
        )

    @property
    def span(self) -> str:
        """The word for one column of the grid."""
        return "interval" if self.each == 1 else f"{self.each} intervals"


def read_source(results: Results) -> Source:
    """Read the data that most sections need.

    Raises:
        OutputError: if the output has no intervals.
        CorruptionError: if its tables cannot be read.
    """
    splits = tuple(split.name for split in results.plan.splits)
    layers = _with_lc(results)
    most = max(10, min(MOST_COLUMNS, MOST_CELLS // len(layers)))
    grid = Columns.of(results, "intervals", most)
    if not grid.total:
        raise OutputError(f"{results.path}: has no intervals; run the analysis again to finish it")
    intervals = _intervals(results, splits, grid)
    by_layer = layer_sums(results, grid, _LAYER_SUMS, splits, layers)
    left_out = len(results.plan.layers) - len(layers)
    return Source(results, splits, layers, left_out, grid, intervals, by_layer)


def _with_lc(results: Results) -> tuple[str, ...]:
    """The parameters, and the buffers whose LC is not 0 everywhere."""
    found = results.sql_arrow("SELECT DISTINCT layer::VARCHAR AS layer FROM layers WHERE lc <> 0")
    moving = set(found["layer"].to_pylist())
    layers = results.plan.layers
    kept = tuple(la.name for la in layers if la.kind == "parameter" or la.name in moving)
    return kept or tuple(la.name for la in layers)


def _intervals(results: Results, splits: tuple[str, ...], grid: Columns) -> dict[str, Floats]:
    more = {
        "loss_start": "arg_min(loss_start, start_step)",
        "loss_end": "arg_max(loss_end, start_step)",
        "n_bad": "count(*) FILTER (status <> 'ok')::DOUBLE",
    }
    what = [*map(total, _SUMS), *(f"{sql} AS {name}" for name, sql in more.items())]
    found = grid.read(results, ALLOCATED, what, ("split",))
    split, col = positions(found, "split", splits), found["col"].to_numpy()
    shape, place = (len(splits), len(grid)), (split, col)
    return {name: scattered(shape, place, numbers(found, name)) for name in (*_SUMS, *more)}
