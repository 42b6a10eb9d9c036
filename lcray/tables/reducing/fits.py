"""Distributions fitted to the histograms of a layer, as rows of the table `fits`."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from lcray.statistics.histograms import Floats, Integers, bin_edges
from lcray.tables.arrow import make_table
from lcray.tables.reducing.merge import Arrays, Source, merge_bins
from lcray.tables.schema import WHOLE_RUN


class Fits:
    """Makes `fits` from the merged histograms as they pass: for each window, and the whole run."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._windows: dict[int, list[pa.Table]] = {}
        self._totals: dict[int, Arrays] = {}

    def watch(self, windows: Iterator[pa.Table]) -> Iterator[pa.Table]:
        """Yields the tables of `merge.histograms` unchanged, and fits each."""
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
        some = bins["sign"] != 0
        edges, column = np.unique(bins["bin"][some], return_inverse=True)
        histograms, row = np.unique(
            np.stack([bins["layer"][some], bins["sign"][some]]), axis=1, return_inverse=True
        )
        counts = np.zeros((histograms.shape[1], len(edges)))
        counts[row.ravel(), column] = bins["count"][some]
        rows = [
            (int(layer), int(sign), "weibull", name, *value)
            for (layer, sign), fit in zip(histograms.T, fit_weibulls(edges, counts), strict=True)
            for name, value in sorted(fit.items())
        ]
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


def fit_weibulls(bins: Integers, counts: Floats) -> list[dict[str, tuple[float, float]]]:
    """Weibull distributions with location 0, by maximum likelihood.

    The standard errors assume independent samples. Values of LC are not, so the errors are too
    small.

    Args:
        bins: the bins of the histograms, ascending, [B].
        counts: the values per bin, [H, B].

    Returns:
        For each histogram, value and standard error (NaN if it has none) of k, lambda, n,
        log_likelihood, aic and ks, the largest |F_empirical − F_fit| at an edge. Empty if the
        likelihood has no maximum, or lambda does not fit into float64.
    """
    from lcray.statistics.families import WEIBULL  # a driver, which imports this, needs no SciPy
    from lcray.statistics.likelihood import distance, fit_bins

    if not counts.size:
        return [{} for _ in counts]
    lower, upper = bin_edges(bins)
    edges = np.unique([lower, upper])
    # A power of two is split off exactly, so that LC scaled by 2^j scales lambda exactly.
    exponent = int(bins[len(bins) // 2]) // 8
    mantissa, power = np.frexp(edges)
    with np.errstate(divide="ignore"):  # log 0 = -inf is intended
        logs = np.log(mantissa) + (power - exponent) * np.log(2.0)
    dense = np.zeros((len(counts), len(edges) - 1))
    dense[:, np.searchsorted(edges, lower)] = counts
    found = fit_bins(WEIBULL, logs, dense, spare=0)
    with np.errstate(over="ignore", invalid="ignore"):
        values = np.exp(found.theta)
        values[:, 1] = np.ldexp(values[:, 1], exponent)
        errors = values * found.errors
    n, ks = counts.sum(axis=1), distance(WEIBULL, logs, found.theta, dense)
    possible = np.isfinite(values + errors).all(axis=1) & np.all(errors > 0, axis=1)
    nan = float("nan")
    return [
        {
            "k": (float(values[i, 0]), float(errors[i, 0])),
            "lambda": (float(values[i, 1]), float(errors[i, 1])),
            "n": (float(n[i]), nan),
            "log_likelihood": (float(found.value[i]), nan),
            "aic": (float(4 - 2 * found.value[i]), nan),
            "ks": (float(ks[i]), nan),
        }
        if possible[i]
        else {}
        for i in range(len(n))
    ]
