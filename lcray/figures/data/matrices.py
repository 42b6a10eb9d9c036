"""LC as matrices over intervals: of all layers, and of the units of one layer.

Legend: S splits, L layers, C columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from lcray.analyses import tidy
from lcray.analyses.requirements import layer_of, require, split_of
from lcray.analyses.series import positions, scattered
from lcray.figures.data.grouping import Columns, Floats, numbers, total
from lcray.tables.columns import COUNT, UNIT, column
from lcray.tables.reading.results import Results
from lcray.tables.reading.views import literal

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
    (tidy.SPLIT, tidy.LAYER, tidy.count("unit", UNIT), *_TIMES, _LC),
    "LC of the units of one layer",
)


def layer_matrix(results: Results, *, columns: int = 200) -> pa.Table:
    """LC of every layer by interval; neighbouring intervals are summed into `columns` at most.

    Args:
        results: the output; needs `layers`.
        columns: the largest number of columns.

    Returns:
        One row for each split, layer in the model's order (buffers too) and column. A note in the
        metadata says how many intervals a column has.

    Raises:
        InapplicableError: if there is no table `layers`.
        UsageError: for fewer columns than 1.
    """
    require(results, "layers")
    splits = [split.name for split in results.plan.splits]
    layers = [layer.name for layer in results.plan.layers]
    times = Columns.of(results, "layers", columns)
    lc = layer_sums(results, times, ("lc",), splits, layers)["lc"]
    split, layer, at = (i.ravel() for i in np.indices(lc.shape))
    keys = {"split": (split, splits), "layer": (layer, layers)}
    return _matrix(_LAYERS, times, keys, lc, at, columns)


def _matrix(
    form: pa.Schema, times: Columns, keys: dict[str, Any], lc: Floats, at: Any, columns: int
) -> pa.Table:
    """A row for each number of `lc`, with the column `at` that it is in."""
    span = {"first_step": times.firsts[at], "end_step": times.ends[at]}
    parameters = {"columns": columns}
    blocks = [keys | span | {"lc": lc.ravel()}]
    return tidy.from_columns(form, blocks, parameters=parameters, notes=times.notes)


def layer_sums(
    results: Results,
    times: Columns,
    names: Sequence[str],
    splits: Sequence[str],
    layers: Sequence[str],
) -> dict[str, Floats]:
    """Sums of columns of `layers` by name, [S, L, C]; NaN if no interval has a number."""
    found = times.read(results, "layers", [total(name) for name in names], ("split", "layer"))
    split, layer = positions(found, "split", splits), positions(found, "layer", layers)
    here = (split >= 0) & (layer >= 0)
    place = split[here], layer[here], found["col"].to_numpy()[here]
    shape = len(splits), len(layers), len(times)
    return {name: scattered(shape, place, numbers(found, name)[here]) for name in names}


def unit_matrix(
    results: Results, layer: str, *, split: str | None = None, columns: int = 200
) -> pa.Table:
    """LC of every unit of a layer by interval; neighbouring intervals are summed, as above.

    Args:
        results: the output; needs `units`.
        layer: its name.
        split: its name; None for ``train``, else the plan's first.
        columns: the largest number of columns.

    Returns:
        One row for each unit and column.

    Raises:
        InapplicableError: if there is no table `units`, or the layer is not in it.
        UsageError: for an unknown layer or split, or fewer columns than 1.
    """
    split = split_of(results, split, "units")
    layer_of(results, layer, "units", results.plan.unit_layers)
    mine = f"(FROM units WHERE split = {literal(split)} AND layer = {literal(layer)})"
    times = Columns.of(results, mine, columns)
    table = times.read(results, mine, [total("lc")], ("unit",))
    units, row = np.unique(table["unit"].to_numpy(), return_inverse=True)
    place = row, table["col"].to_numpy()
    lc = scattered((len(units), len(times)), place, numbers(table, "lc"))
    which, at = (i.ravel() for i in np.indices(lc.shape))
    keys = {"split": split, "layer": layer, "unit": units[which]}
    return _matrix(_UNITS, times, keys, lc, at, columns)
