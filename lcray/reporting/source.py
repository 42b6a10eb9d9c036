"""An output's tables, aggregated to what a picture can show.

Legend: S splits, B columns of the time grid, L layers, T intervals.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from lcray.errors import InapplicableError, OutputError
from lcray.recipes import recipe_for
from lcray.results import Results

Floats = NDArray[np.float64]

#: The most columns of a time axis, and the most cells of a picture of layers by time.
MOST_COLUMNS, MOST_CELLS = 1000, 200_000

_SUMS = ("loss_change", "lc", "gap", "first_order_lc", "n_helping", "n_hurting", "n_zero")
#: The table `intervals`, where only those with LC have a change: sums of both compare.
ALLOCATED = (
    "(SELECT * REPLACE (CASE WHEN lc IS NOT NULL THEN loss_change END AS loss_change) "
    "FROM intervals)"
)
_LAYER_SUMS = ("lc", "n_helping", "n_hurting", "n_zero")


@dataclass(frozen=True)
class Source:
    """What sections are made from.

    Attributes:
        results: the output.
        splits: names [S].
        layers: names [L] in the model's order; buffers that never have LC are left out.
        left_out: how many those are.
        each: intervals that are added up in a column of the grid.
        n_intervals: T.
        starts: the first step of each column [B].
        ends: the last step of each column [B].
        intervals: by column of `intervals`, sums [S, B]; NaN where there is none.
        by_layer: by column of `layers`, sums [S, L, B], likewise.
    """

    results: Results
    splits: tuple[str, ...]
    layers: tuple[str, ...]
    left_out: int
    each: int
    n_intervals: int
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    intervals: dict[str, Floats]
    by_layer: dict[str, Floats]

    @cached_property
    def grid(self) -> str:
        """The beginning of a query, that has the grid as a table: start_step and column."""
        return grid_sql(self.each)

    @cached_property
    def totals(self) -> Floats:
        """LC of the layers over the run, [S, L]."""
        return np.asarray(np.nansum(self.by_layer["lc"], axis=2))

    @property
    def coarse(self) -> tuple[str, ...]:
        """What to say where intervals are added up."""
        if self.each == 1:
            return ()
        return (
            f"The run has {self.n_intervals:,} intervals: here each point or column adds up "
            f"{self.each:,} of them. The tables have every one.",
        )

    @property
    def span(self) -> str:
        """What a column of the grid is called."""
        return "interval" if self.each == 1 else f"{self.each} intervals"

    def need(self, *tables: str) -> None:
        """Raises InapplicableError unless the output has these tables."""
        for table in tables:
            if table not in self.results.tables:
                raise InapplicableError(f"there is no table {table}: {recipe_for(table)}")

    def sql(self, query: str) -> pa.Table:
        """What lcray's own query gives."""
        return self.results.sql_arrow(query)


def grid_sql(each: int) -> str:
    """The common table expression of the grid."""
    return (
        f"WITH grid AS (SELECT start_step, (row_number() OVER (ORDER BY start_step) - 1) // {each} "
        "AS col FROM (SELECT DISTINCT start_step FROM intervals))\n"
    )


def read_source(results: Results) -> Source:
    """Reads what most sections need.

    Raises:
        OutputError: if the output has no intervals.
        CorruptionError: if its tables cannot be read.
    """
    splits = tuple(split.name for split in results.plan.splits)
    known = tuple(layer.name for layer in results.plan.layers)
    layers = _with_lc(results)
    found = results.sql_arrow("SELECT count(DISTINCT start_step) AS n FROM intervals")
    n_intervals = int(found["n"][0].as_py())
    if not n_intervals:
        raise OutputError(f"{results.path}: has no intervals; run the analysis again to finish it")
    columns = max(10, min(MOST_COLUMNS, MOST_CELLS // len(layers)))
    each = -(-n_intervals // columns)
    width = -(-n_intervals // each)
    starts, ends, intervals = _intervals(results, splits, each, width)
    by_layer = _by_layer(results, splits, layers, each, width)
    return Source(
        results,
        splits,
        layers,
        len(known) - len(layers),
        each,
        n_intervals,
        starts,
        ends,
        intervals,
        by_layer,
    )


def _with_lc(results: Results) -> tuple[str, ...]:
    """The parameters, and the buffers whose LC is not 0 everywhere."""
    found = results.sql_arrow("SELECT DISTINCT layer::VARCHAR AS layer FROM layers WHERE lc <> 0")
    moving = set(found["layer"].to_pylist())
    layers = results.plan.layers
    kept = tuple(la.name for la in layers if la.kind == "parameter" or la.name in moving)
    return kept or tuple(la.name for la in layers)


def total(column: str) -> str:
    """SQL of a sum that is the same bit for bit, however many threads add."""
    return f"sum({column}::DOUBLE ORDER BY start_step) AS {column}"


def _intervals(
    results: Results, splits: tuple[str, ...], each: int, width: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], dict[str, Floats]]:
    found = results.sql_arrow(
        grid_sql(each) + "SELECT split, col, min(start_step) AS starts, max(end_step) AS ends, "
        "arg_min(loss_start, start_step) AS loss_start, arg_max(loss_end, start_step) AS loss_end, "
        f"{', '.join(map(total, _SUMS))}, sum(abs(gap) ORDER BY start_step) AS abs_gap, "
        "sum(abs(loss_change) ORDER BY start_step) AS abs_change, "
        "sum(n_gradients)::DOUBLE AS n_gradients, "
        "count(*) FILTER (status <> 'ok')::DOUBLE AS n_bad "
        f"FROM {ALLOCATED} JOIN grid USING (start_step) GROUP BY split, col ORDER BY split, col"
    )
    split, col = positions(found, "split", splits), found["col"].to_numpy()
    starts, ends = np.zeros(width, np.int64), np.zeros(width, np.int64)
    starts[col], ends[col] = found["starts"].to_numpy(), found["ends"].to_numpy()
    values = {}
    names = ("loss_start", "loss_end", *_SUMS, "abs_gap", "abs_change", "n_gradients", "n_bad")
    for name in names:
        values[name] = np.full((len(splits), width), np.nan)
        values[name][split, col] = numbers(found, name)
    return starts, ends, values


def _by_layer(
    results: Results, splits: tuple[str, ...], layers: tuple[str, ...], each: int, width: int
) -> dict[str, Floats]:
    found = results.sql_arrow(
        grid_sql(each) + f"SELECT split, layer, col, {', '.join(map(total, _LAYER_SUMS))} "
        "FROM layers JOIN grid USING (start_step) GROUP BY split, layer, col"
    )
    split, layer = positions(found, "split", splits), positions(found, "layer", layers)
    here = layer >= 0
    place = split[here], layer[here], found["col"].to_numpy()[here]
    values = {}
    for name in _LAYER_SUMS:
        values[name] = np.full((len(splits), len(layers), width), np.nan)
        values[name][place] = numbers(found, name)[here]
    return values


def positions(table: pa.Table, column: str, names: Sequence[str]) -> NDArray[np.int64]:
    """The place in `names` of each text of a column; -1 where it is none of them."""
    found = pd.Index([*names], dtype=object).get_indexer(table[column].to_pandas().astype(object))
    return np.asarray(found, np.int64)


def numbers(table: pa.Table, column: str) -> Floats:
    """A column as float64; NaN for null."""
    values: Any = table[column].to_numpy()
    return np.asarray(values, np.float64)
