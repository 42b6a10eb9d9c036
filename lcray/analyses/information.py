"""Fisher information and LC, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pandas as pd
import pyarrow as pa

from lcray.analyses import tidy
from lcray.analyses.windows import Ranges, Window, Windows
from lcray.tables.reading.results import Results

_TRACE = "loss**2/parameter**2"

_FORM = tidy.schema(
    "fisher",
    "split first_step end_step window layer",
    (
        tidy.SPLIT,
        *tidy.WINDOW,
        tidy.LAYER,
        tidy.count("numel", "parameters of the layer"),
        tidy.number("lc", tidy.LOSS, "sum over the window's intervals"),
        tidy.number("lc_share", "1", "of the LC of all layers listed; they add up to 1"),
        tidy.count("n_steps", "steps of the window with Fisher information"),
        tidy.number("trace_true", _TRACE, "mean over these steps"),
        tidy.number("trace_true_se", _TRACE, "mean of the standard errors: the samples are shared"),
        tidy.number("true_share", "1", "of the traces of all layers"),
        tidy.number("trace_empirical", _TRACE, "mean over these steps"),
        tidy.number("trace_empirical_se", _TRACE, "mean of the standard errors"),
        tidy.number("empirical_share", "1", "of the traces of all layers"),
    ),
    "LC and the trace of the Fisher information of every layer that is trained",
)
_TRACES = ("trace_true", "trace_true_se", "trace_empirical", "trace_empirical_se")


def fisher(
    results: Results, *, window: int | None = None, windows: Ranges | None = None
) -> pa.Table:
    """LC of each layer, next to how much the model's output depends on the layer.

    The trace of the Fisher information measures what a layer has learned in Achille et al. 2017
    (arXiv 1711.08856). It has no sign, and it changes with the scale of the weights even if the
    function, and LC, do not: [LCA]'s author response gives this as a reason to look at LC. Traces
    are means over the steps of the window that have them. The same samples are taken at every step,
    so the errors are means as well.

    Args:
        results: the output; needs `layers` and `fisher`.
        window: as in `Windows.of`.
        windows: as in `Windows.of`.

    Returns:
        One row for each split, window that has a step with traces, and trained layer.

    Raises:
        UsageError: for invalid windows.
    """
    chosen = Windows.of(results, window, windows)
    layers, traces = results.layers(), results.fisher()
    rows: list[dict[str, Any]] = []
    for split in results.plan.splits:
        of_layers = layers[layers["split"] == split.name]
        of_traces = traces[traces["split"] == split.name]
        for item in chosen:
            lc = of_layers[item.holds(of_layers["start_step"].to_numpy())]
            found = of_traces[item.holds(of_traces["step"].to_numpy())]
            rows += _rows(results, split.name, item, lc, found)
    return tidy.table(_FORM, rows, parameters={})


def _rows(
    results: Results, split: str, item: Window, lc: pd.DataFrame, traces: pd.DataFrame
) -> Iterator[dict[str, Any]]:
    if not len(traces):
        return
    means = traces.groupby("layer", observed=True)[list(_TRACES)].mean()
    sums = lc.groupby("layer", observed=True)["lc"].sum(min_count=1).reindex(means.index)
    totals = means.sum(min_count=1)
    sizes = {layer.name: layer.numel for layer in results.plan.layers}
    for layer, row in zip(map(str, means.index), means.to_dict("records"), strict=True):
        yield {
            "split": split,
            **item.columns,
            "layer": layer,
            "numel": sizes[layer],
            "lc": float(sums[layer]),
            "lc_share": _part(sums[layer], sums.sum()),
            "n_steps": traces["step"].nunique(),
            "true_share": _part(row["trace_true"], totals["trace_true"]),
            "empirical_share": _part(row["trace_empirical"], totals["trace_empirical"]),
            **{name: row[name] for name in _TRACES},
        }


def _part(part: float, whole: float) -> float:
    return float(part) / float(whole) if whole else float("nan")
