"""The data behind the page's slider: single intervals, and windows of them."""

from __future__ import annotations

from typing import Any

import numpy as np

from lcray.analyses.closure import ALLOCATED
from lcray.figures.data.grouping import numbers, positions
from lcray.figures.html.source import Source
from lcray.figures.html.store import Store

MOST_WINDOWS = 1000


def window_widths(source: Source) -> list[int]:
    """Widths in steps that the slider offers in addition to single intervals."""
    steps = source.results.plan.steps
    run = steps[-1] - steps[0]
    wanted = (source.results.plan.window, -(-run // 4), run)
    return sorted({w for w in wanted if 1 < w <= run and run / w <= MOST_WINDOWS})


def windows(source: Source, store: Store) -> list[dict[str, Any]]:
    """LC of layers and the network for each column and window that the slider can show."""
    n_layers = len(source.layers)
    lc = store.add(source.by_layer["lc"])
    totals = {k: store.add(source.intervals[k]) for k in ("loss_change", "lc")}
    found = [
        {
            "label": f"single {source.span}" if source.each == 1 else source.span,
            "starts": store.put(source.starts),
            "ends": store.put(source.ends),
            "lc": [lc.matrix(s) for s in range(len(source.splits))],
            "change": [totals["loss_change"].row(s) for s in range(len(source.splits))],
            "total": [totals["lc"].row(s) for s in range(len(source.splits))],
        }
    ]
    origin = 0
    for width in window_widths(source):
        whole = width == window_widths(source)[-1]
        origin = source.results.plan.steps[0] if whole else 0
        found.append(_window(source, store, width, origin, n_layers))
    return found


def _window(source: Source, store: Store, width: int, origin: int, n: int) -> dict[str, Any]:
    group = f"(start_step - {origin}) // {width}"
    layers = source.sql(
        f"SELECT split, layer, {group} AS part, sum(lc ORDER BY start_step) AS lc "
        "FROM layers GROUP BY ALL"
    )
    sums = source.sql(
        f"SELECT split, {group} AS part, min(start_step) AS starts, max(end_step) AS ends, "
        "sum(loss_change ORDER BY start_step) AS change, sum(lc ORDER BY start_step) AS lc "
        f"FROM {ALLOCATED} GROUP BY ALL ORDER BY ALL"
    )
    parts, number = np.unique(sums["part"].to_numpy(), return_inverse=True)
    shape = len(source.splits), len(parts)
    lc = np.full((shape[0], n, shape[1]), np.nan)
    split, at = positions(layers, "split", source.splits), positions(layers, "layer", source.layers)
    here, part = at >= 0, np.searchsorted(parts, layers["part"].to_numpy())
    lc[split[here], at[here], part[here]] = numbers(layers, "lc")[here]
    of = {name: np.full(shape, np.nan) for name in ("change", "lc")}
    for name, values in of.items():
        values[positions(sums, "split", source.splits), number] = numbers(sums, name)
    edges = {name: np.zeros(shape[1], np.int64) for name in ("starts", "ends")}
    for name, ends in edges.items():
        ends[number] = sums[name].to_numpy()
    packed = store.add(lc)
    change, total = store.add(of["change"]), store.add(of["lc"])
    run = len(parts) == 1
    return {
        "label": "whole run" if run else f"window of {width:,} steps",
        "starts": store.put(edges["starts"]),
        "ends": store.put(edges["ends"]),
        "lc": [packed.matrix(s) for s in range(shape[0])],
        "change": [change.row(s) for s in range(shape[0])],
        "total": [total.row(s) for s in range(shape[0])],
    }
