"""The data behind the page's slider: single intervals, and windows of them."""

from __future__ import annotations

from typing import Any

import numpy as np

from lcray.analyses.closure import ALLOCATED
from lcray.analyses.series import Floats, positions, scattered
from lcray.figures.data.grouping import numbers
from lcray.figures.html.source import Source
from lcray.figures.html.store import Store

MOST_WINDOWS = 1000


def windows(source: Source, store: Store) -> list[dict[str, Any]]:
    """LC of layers and the network for each column and window that the slider can show.

    The windows have the plan's width, a quarter of the run's, and that of the run.
    """
    label = f"single {source.span}" if source.each == 1 else source.span
    sums = (source.intervals["loss_change"], source.intervals["lc"])
    found = [_shown(store, label, (source.starts, source.ends), source.by_layer["lc"], *sums)]
    first, last = source.results.plan.steps[0], source.results.plan.steps[-1]
    run = last - first
    wanted = {source.results.plan.window, -(-run // 4), run}
    for width in sorted(w for w in wanted if 1 < w <= run and run / w <= MOST_WINDOWS):
        found.append(_window(source, store, width, first if width == run else 0))
    return found


def _shown(
    store: Store, label: str, ends: tuple[Any, Any], lc: Floats, change: Floats, total: Floats
) -> dict[str, Any]:
    """Intervals or windows for the slider: LC is [S, L, W], the sums are [S, W]."""
    packed, changes, totals = (store.add(values) for values in (lc, change, total))
    splits = range(len(lc))
    return {
        "label": label,
        "starts": store.put(ends[0]),
        "ends": store.put(ends[1]),
        "lc": [packed.matrix(s) for s in splits],
        "change": [changes.row(s) for s in splits],
        "total": [totals.row(s) for s in splits],
    }


def _window(source: Source, store: Store, width: int, origin: int) -> dict[str, Any]:
    group = f"(start_step - {origin}) // {width}"
    layers = source.results.sql_arrow(
        f"SELECT split, layer, {group} AS part, sum(lc ORDER BY start_step) AS lc "
        "FROM layers GROUP BY ALL"
    )
    sums = source.results.sql_arrow(
        f"SELECT split, {group} AS part, min(start_step) AS starts, max(end_step) AS ends, "
        "sum(loss_change ORDER BY start_step) AS change, sum(lc ORDER BY start_step) AS lc "
        f"FROM {ALLOCATED} GROUP BY ALL ORDER BY ALL"
    )
    parts, first, number = np.unique(
        sums["part"].to_numpy(), return_index=True, return_inverse=True
    )
    split, at = positions(layers, "split", source.splits), positions(layers, "layer", source.layers)
    here, part = at >= 0, np.searchsorted(parts, layers["part"].to_numpy())
    shape = len(source.splits), len(source.layers), len(parts)
    lc = scattered(shape, (split[here], at[here], part[here]), numbers(layers, "lc")[here])
    place = positions(sums, "split", source.splits), number
    change, total = (
        scattered((shape[0], shape[2]), place, numbers(sums, name)) for name in ("change", "lc")
    )
    label = "whole run" if len(parts) == 1 else f"window of {width:,} steps"
    ends = sums["starts"].to_numpy()[first], sums["ends"].to_numpy()[first]
    return _shown(store, label, ends, lc, change, total)
