"""LC as matrices over intervals: of all layers, and of the units of one."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from lcray.analyses import tidy
from lcray.analyses.series import Floats, layer_series
from lcray.analyses.tables import layer_of, only, require, split_of
from lcray.columns import COUNT, column
from lcray.figures.grouping import Columns
from lcray.results import Results

_TIMES = (
    tidy.count("first_step", "start of the column's first interval"),
    column("end_step", COUNT, "step", "end of the column's last interval"),
)
_LC = tidy.number("lc", tidy.LOSS, "sum over the column's intervals; null where none has LC")

_LAYERS = tidy.schema(
    "layer_matrix", "split layer first_step", (tidy.SPLIT, tidy.LAYER, *_TIMES, _LC), "LC of layers"
)
_UNITS = tidy.schema(
    "unit_matrix",
    "split layer unit first_step",
    (
        tidy.SPLIT,
        tidy.LAYER,
        tidy.count("unit", "position along the output axis"),
        *_TIMES,
        _LC,
    ),
    "LC of the units of one layer",
)


def layer_matrix(results: Results, *, columns: int = 200) -> pa.Table:
    """LC of every layer by interval, neighbouring ones added up to at most `columns`.

    Args:
        results: of the output; needs `layers`.
        columns: the most.

    Returns:
        One row for each split, layer in the model's order (buffers too) and column; a note in the
        metadata says how many intervals are in one.

    Raises:
        InapplicableError: if there is no table `layers`.
        UsageError: for fewer columns than 1.
    """
    require(results, "layers")
    series = layer_series(results, ["lc"], ("parameter", "buffer"))
    times = Columns.of(series.starts, series.ends, columns)
    lc = np.stack([times.sums(series["lc"][s]).T for s in range(len(series.splits))])
    split, layer, at = (i.ravel() for i in np.indices(lc.shape))
    found = {
        "split": (split, list(series.splits)),
        "layer": (layer, list(series.layers)),
        "first_step": times.firsts[at],
        "end_step": times.ends[at],
        "lc": lc.ravel(),
    }
    return tidy.stamped(
        tidy.from_columns(_LAYERS, found), parameters={"columns": columns}, notes=times.notes
    )


def unit_matrix(
    results: Results, layer: str, *, split: str | None = None, columns: int = 200
) -> pa.Table:
    """LC of every unit of a layer by interval, neighbouring ones added up to at most `columns`.

    Args:
        results: of the output; needs `units`.
        layer: its name.
        split: its name; None for ``train``, else the plan's first.
        columns: the most.

    Returns:
        One row for each unit and column.

    Raises:
        InapplicableError: if there is no table `units`, or it has not this layer.
        UsageError: for an unknown layer or split, or fewer columns than 1.
    """
    require(results, "units")
    split = split_of(results, split)
    layer_of(results, layer, "units", results.plan.unit_layers)
    mine = only(split=split, layer=layer)
    table = results.arrow("units", columns=["start_step", "unit", "lc"], filters=mine)
    start, unit = table["start_step"].to_numpy(), table["unit"].to_numpy()
    starts, row = np.unique(start, return_inverse=True)
    units, place = np.unique(unit, return_inverse=True)
    grid: Floats = np.full((len(starts), len(units)), np.nan)
    grid[row, place] = table["lc"].to_numpy().astype(np.float64)
    steps = np.array(results.plan.steps)
    times = Columns.of(starts, steps[np.searchsorted(steps, starts) + 1], columns)
    lc = times.sums(grid).T
    which, at = (i.ravel() for i in np.indices(lc.shape))
    found = {
        "split": (np.zeros(lc.size, np.int64), [split]),
        "layer": (np.zeros(lc.size, np.int64), [layer]),
        "unit": units[which],
        "first_step": times.firsts[at],
        "end_step": times.ends[at],
        "lc": lc.ravel(),
    }
    return tidy.stamped(
        tidy.from_columns(_UNITS, found), parameters={"columns": columns}, notes=times.notes
    )
