"""The `layers` table as arrays over split, interval and layer.

Legend: S splits, T intervals, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from lcray.tables.reading.results import Results

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Series:
    """Columns of `layers` as arrays; intervals in order, splits and layers in the plan's order.

    Attributes:
        splits: names, [S].
        layers: names, [L].
        starts: start steps of the intervals, [T].
        ends: their end steps, [T].
        ok: [S, T], False if an interval has no LC in a split (not finite, or missing).
        values: by column, float64 [S, T, L]; NaN if there is none.
    """

    splits: tuple[str, ...]
    layers: tuple[str, ...]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    ok: NDArray[np.bool_]
    values: Mapping[str, Floats]

    def __getitem__(self, column: str) -> Floats:
        return self.values[column]


def layer_series(
    results: Results, columns: Sequence[str], kinds: Sequence[str] = ("parameter",)
) -> Series:
    """Reads columns of `layers`.

    Args:
        results: the output.
        columns: numeric columns to read.
        kinds: kinds of layers to read: ``parameter``, ``buffer``.

    Raises:
        UsageError: for a column that does not exist.
        CorruptionError: if the table cannot be read.
    """
    keys = ["split", "layer", "start_step", "end_step", "lc"]
    table = results.arrow("layers", columns=list(dict.fromkeys([*keys, *columns])))
    splits = tuple(split.name for split in results.plan.splits)
    layers = tuple(layer.name for layer in results.plan.layers if layer.kind in kinds)
    split, layer = positions(table, "split", splits), positions(table, "layer", layers)
    start = table["start_step"].to_numpy()
    starts, row = np.unique(start, return_index=True)
    t = np.searchsorted(starts, start)
    here = (split >= 0) & (layer >= 0)
    place = split[here], t[here], layer[here]
    values = {}
    for name in ("lc", *columns):
        found = table[name].to_numpy().astype(np.float64)[here]
        values[name] = scattered((len(splits), len(starts), len(layers)), place, found)
    ok = np.asarray(np.isfinite(values["lc"]).all(axis=2))
    return Series(splits, layers, starts, table["end_step"].to_numpy()[row], ok, values)


def intervals(series: Series, ok: NDArray[np.bool_]) -> dict[str, Any]:
    """Columns of the intervals that are `ok` [T] one by one, the network and each layer in turn."""
    starts, ends = series.starts[ok], series.ends[ok]
    at, layer = (i.ravel() for i in np.indices((len(starts), 1 + len(series.layers))))
    return {
        "resolution": "interval",
        "window": (at, [f"{a}:{b}" for a, b in zip(starts, ends, strict=True)]),
        "first_step": starts[at],
        "end_step": ends[at],
        "layer": (layer, ["", *series.layers]),
        "n_intervals": 1,
    }


def with_network(values: Floats) -> Floats:
    """Values of layers along the last axis, with their sum, that of the network, before them."""
    return np.concatenate([values.sum(axis=-1, keepdims=True), values], axis=-1)


def scattered(shape: tuple[int, ...], place: Any, values: Any) -> Floats:
    """An array of this shape that has `values` at the indices `place`, and NaN elsewhere."""
    grid: Floats = np.full(shape, np.nan)
    grid[place] = values
    return grid


def positions(table: pa.Table, column: str, names: Sequence[str]) -> NDArray[np.int64]:
    """The position in `names` of each text of a column; -1 for other texts."""
    found = pc.index_in(table[column], value_set=pa.array(names, pa.string()))
    return np.asarray(pc.fill_null(found, -1).to_numpy(), np.int64)
