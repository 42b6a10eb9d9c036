"""Distributions fitted to the histograms of a layer, as rows of the table `fits`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from lcray.statistics.histograms import bin_edges
from lcray.statistics.weibull import fit_weibull
from lcray.tables.arrow import make_table
from lcray.tables.reducing.merge import Arrays, Source, merge_bins
from lcray.tables.schema import WHOLE_RUN


class Fits:
    """Collects `fits` while the merged histograms pass by: each window, and the whole run."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._windows: dict[int, list[pa.Table]] = {}
        self._totals: dict[int, Arrays] = {}

    def watch(self, windows: Iterator[pa.Table]) -> Iterator[pa.Table]:
        """Passes on the tables of `merging.histograms` and fits each."""
        for table in windows:
            split = int(self._source.codes(table, "split")[0])
            bins = _bins(self._source, table)
            self._windows.setdefault(split, []).append(self._fit(split, bins))
            run = bins | {"window": np.full(table.num_rows, WHOLE_RUN)}
            total = self._totals.get(split)
            self._totals[split] = merge_bins([run] if total is None else [total, run])
            yield table

    def rows(self) -> Iterator[pa.Table]:
        """The rows of `fits`; those of the whole run come first in each split."""
        for split in sorted(self._totals):
            yield self._fit(split, self._totals[split])
            yield from self._windows[split]

    def _fit(self, split: int, bins: Arrays) -> pa.Table:
        rows: list[tuple[int, int, str, str, float, float]] = []
        for layer in np.unique(bins["layer"]):
            for sign in (-1, 1):
                here = (bins["layer"] == layer) & (bins["sign"] == sign)
                rows += [(int(layer), sign, *row) for row in _fit_rows(bins, here)]
        columns = list(zip(*rows, strict=True)) or [()] * 6
        return make_table(
            "fits",
            {
                "split": (split, self._source.splits),
                "window": int(bins["window"][0]),
                "layer": (np.array(columns[0], np.int32), self._source.layers),
                "sign": np.array(columns[1], np.int8),
                "distribution": list(columns[2]),
                "parameter": list(columns[3]),
                "value": np.array(columns[4], np.float64),
                "se": np.array(columns[5], np.float64),
            },
        )


def _bins(source: Source, table: pa.Table) -> Arrays:
    names = ("window", "sign", "bin", "count", "sum")
    columns = {name: table.column(name).to_numpy() for name in names}
    return columns | {"layer": source.codes(table, "layer")}


def _fit_rows(bins: Arrays, here: Any) -> list[tuple[str, str, float, float]]:
    """(distribution, parameter, value, se) of the fit to one histogram, by parameter."""
    fit = fit_weibull(*bin_edges(bins["bin"][here]), bins["count"][here])
    if fit is None:
        return []
    values = {name: (v, fit.standard_errors[name]) for name, v in fit.parameters.items()}
    for name in ("n", "log_likelihood", "aic", "ks"):
        values[name] = (float(getattr(fit, name)), float("nan"))
    return [(fit.distribution, name, *values[name]) for name in sorted(values)]
