"""The `layers` table as arrays over split, interval and layer.

Legend: S splits, T intervals, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
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
    split, layer = codes(table, "split", splits), codes(table, "layer", layers)
    start = table["start_step"].to_numpy()
    starts, row = np.unique(start, return_index=True)
    t = np.searchsorted(starts, start)
    here = (split >= 0) & (layer >= 0)
    place = split[here], t[here], layer[here]
    values = {}
    for name in ("lc", *columns):
        grid = np.full((len(splits), len(starts), len(layers)), np.nan)
        grid[place] = table[name].to_numpy().astype(np.float64)[here]
        values[name] = grid
    ok = np.isfinite(values["lc"]).all(axis=2)
    return Series(splits, layers, starts, table["end_step"].to_numpy()[row], ok, values)


def codes(table: pa.Table, column: str, names: Sequence[str]) -> NDArray[Any]:
    """The position in `names` of each value of a dictionary column; -1 for others."""
    array = table[column].unify_dictionaries().combine_chunks()
    if isinstance(array, pa.ChunkedArray):  # without rows, or from older versions of pyarrow
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], array.type)
    position = {name: i for i, name in enumerate(names)}
    lookup = [position.get(name, -1) for name in array.dictionary.to_pylist()]
    return np.array(lookup, np.int64)[array.indices.to_numpy()] if lookup else np.zeros(0, np.int64)
